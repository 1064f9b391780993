"""Messages in, a streamed answer out: our own engine, or a local Ollama server."""
