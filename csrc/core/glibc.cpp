// Lets the library load where glibc is older than 2.32, as PyPI's wheels do (manylinux_2_28).
// libstdc++'s headers ask that glibc for this variable, to count references without atomic
// instructions while there is one thread. 0 says that there may be several.
#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>

extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
