"""Files in, chunks out: load (files to documents), clean (their text), chunk (documents to passages)."""
