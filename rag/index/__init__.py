"""What was ingested: searched by dense.py, kept on disk by store.py."""
