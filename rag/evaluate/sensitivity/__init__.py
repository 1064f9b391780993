"""Numerical sensitivity: how much results depend on what should not matter, such as batch sizes and number formats.

The same evaluation is done again with one setting changed at a time, and compared with the reference: the system as
it is configured, all questions searched for at once and answered in one call. The settings, one axis each:

    tokens_per_batch   of the embedder: which texts run together, and how far they are padded
    search_batches     questions that are embedded and searched for together
    vector_dtypes      the vectors of passages and questions are rounded to it before the search
    answer_batches     questions that are answered together, from the reference's passages
    answer_budgets     lengths of answers for which prompts that are prefilled together need caches of two sizes:
                       a short and a long prompt in one call, compared with each one alone
    answer_dtypes      the arithmetic of the generator, with the reference's passages

A setting that is the configured one is a plain repetition. No cached results are used: there is no memo here.
"""
