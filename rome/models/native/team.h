// Threads of a call, as far as they touch XLA: see team.c.

#ifndef ROME_NATIVE_TEAM_H_
#define ROME_NATIVE_TEAM_H_

#include "native.h"
#include "xla/ffi/api/c_api.h"

typedef void team_fn(void *arg, struct team *team, int workers);

// Calls body(arg, team, workers) with up to `most` workers, or with all that the pool has if 0.
void with_team(const XLA_FFI_CallFrame *frame, int most, team_fn *body, void *arg);

static inline void drop_error(const XLA_FFI_CallFrame *frame, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args args = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE,
                                     .error = error};
  frame->api->XLA_FFI_Error_Destroy(&args);
}

#endif  // ROME_NATIVE_TEAM_H_
