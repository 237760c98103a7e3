"""The C++ code under sanitizers and valgrind."""
