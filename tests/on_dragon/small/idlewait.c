/* Dragon's waits give their core away: preloaded in tests, where several nodes share two cores.
 *
 * Written against DragonHPC 0.15.0. Its processes wait in two ways that keep a core busy: a
 * broadcast object is waited for with DRAGON_SPIN_WAIT or the adaptive mode, which spins first, and
 * locks and channels call sched_yield() in a loop. Neither can be configured for all of them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <time.h>

#define DRAGON_IDLE_WAIT 0
#define YIELD_NS 200000 /* long against a turn of the loop, short against a task */

typedef int (*wait_fn)(void *, int, const void *, void **, size_t *, void *, const void *);

/* Whatever mode is asked for, sleep until the kernel wakes us. */
int dragon_bcast_wait(void *bcast, int mode, const void *timer, void **payload, size_t *size,
                      void *release, const void *release_arg) {
  static wait_fn real;
  (void)mode;
  if (!real) { /* not RTLD_NEXT: Python's extensions load it as a local library */
    void *library = dlopen("libdragon.so", RTLD_NOLOAD | RTLD_LAZY);
    real = (wait_fn)dlsym(library, "dragon_bcast_wait");
  }
  return real(bcast, DRAGON_IDLE_WAIT, timer, payload, size, release, release_arg);
}

/* With few cores and many spinners the one who is waited for would come last. */
int sched_yield(void) {
  struct timespec nap = {0, YIELD_NS};
  nanosleep(&nap, 0);
  return 0;
}
