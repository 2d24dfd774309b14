"""Short scripts that use the pieces of the runtime as a library; see README.md beside this file."""
