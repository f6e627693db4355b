"""Results as plain data: records, the files they are kept in, and the tables made of them. Imports no torch."""
