"""Language models made of experts: build, upcycle, train, compress, decode, look inside."""
