"""Services for every stage: cache/, code/ (its versions), machine/; option types, JSON records, files, array sizes."""
