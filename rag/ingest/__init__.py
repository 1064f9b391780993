"""From files to chunks: load files as documents, clean their text, divide it into chunks."""
