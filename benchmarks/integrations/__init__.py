"""Training steps of other libraries' models before and after fastgen.patch()."""
