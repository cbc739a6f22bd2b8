// Stands in for a variable of glibc 2.32 that libstdc++'s shared_ptr reads to skip atomics in a single-threaded process;
// without it the library would not load with glibc 2.28. Always "there may be threads": torch has some.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
