"""The demo: an invented company's handbook, questions about it, and how to run them."""
