// Lets the library load where libstdc++ is older than GCC 11's, as PyPI's wheels do
// (manylinux_2_28), beside torch 2.11. torch's headers call these two functions for error messages.
// Later torches bring them; all of them bring the others that are new.
#include <sstream>

#if defined(__GLIBCXX__) && _GLIBCXX_USE_CXX11_ABI
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;
#endif
