// The entry points that XLA calls: arguments are read out of its call frames here and nowhere else.

#include <stdlib.h>

#include "team.h"

#define EXPORT __attribute__((visibility("default")))

// In the order of rome.models.native.engine.
enum { TOKENS, ROWS, POSITIONS, TABLE, K, V, CHOICES, EMBEDDING, ROPE, NORM, LAYERS };

static XLA_FFI_Error *failure(const XLA_FFI_CallFrame *frame, const char *message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = message,
                                    .errc = XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

// Whether this call only asks which version of the interface was compiled in; answers it.
static int asks_version(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Extension_Base *extension = frame->extension_start;
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

static const XLA_FFI_Buffer *operand(const XLA_FFI_CallFrame *frame, int i) {
  return frame->args.args[i];
}

static void *result(const XLA_FFI_CallFrame *frame, int i) {
  return ((XLA_FFI_Buffer *)frame->rets.rets[i])->data;
}

// The data of an attribute: of a scalar its value, of an array its values.
static const void *attribute(const XLA_FFI_CallFrame *frame, const char *name) {
  for (int64_t i = 0; i < frame->attrs.size; i++) {
    const XLA_FFI_ByteSpan *is = frame->attrs.names[i];
    if (is->len != strlen(name) || memcmp(is->ptr, name, is->len)) continue;
    const void *found = frame->attrs.attrs[i];
    return frame->attrs.types[i] == XLA_FFI_AttrType_ARRAY ? ((const XLA_FFI_Array *)found)->data
                                                           : ((const XLA_FFI_Scalar *)found)->value;
  }
  return NULL;
}

struct extending {
  struct model model;
  struct call call;
  int done;
};

static void extend_body(void *arg, struct team *team, int workers) {
  struct extending *e = arg;
  e->done = forward(&e->model, &e->call, team, workers);
}

EXPORT XLA_FFI_Error *rome_native_extend(XLA_FFI_CallFrame *frame) {
  if (asks_version(frame)) return NULL;
  const int64_t *sizes = attribute(frame, "sizes");
  const float *epsilon = attribute(frame, "epsilon");
  if (!sizes || !epsilon) return failure(frame, "rome_native_extend: an attribute is missing");
  int layers = (int)sizes[8];
  if (frame->args.size != LAYERS + LAYER_SLOTS * layers)
    return failure(frame, "rome_native_extend: the number of arguments is wrong");
  struct layer layer[layers];
  for (int i = 0; i < layers; i++)
    for (int j = 0; j < LAYER_SLOTS; j++) {
      const XLA_FFI_Buffer *slot = operand(frame, LAYERS + LAYER_SLOTS * i + j);
      ((const float **)&layer[i])[j] = slot->dims[0] ? slot->data : NULL;
    }
  struct extending e = {
      .model = {.width = sizes[0],
                .heads = sizes[1],
                .groups = sizes[2],
                .head_width = sizes[3],
                .experts = sizes[4],
                .chosen = sizes[5],
                .expert_inner = sizes[6],
                .dense_inner = sizes[7],
                .layers = layers,
                .vocab = sizes[9],
                .normalise = sizes[10],
                .epsilon = *epsilon,
                .embedding = operand(frame, EMBEDDING)->data,
                .rope = operand(frame, ROPE)->data,
                .max_length = operand(frame, ROPE)->dims[0],
                .norm = operand(frame, NORM)->data,
                .layer = layer},
      .call = {.tokens = operand(frame, TOKENS)->data,
               .rows = operand(frame, ROWS)->data,
               .positions = operand(frame, POSITIONS)->data,
               .table = operand(frame, TABLE)->data,
               .num_tokens = operand(frame, TOKENS)->dims[0],
               .num_rows = operand(frame, TABLE)->dims[0],
               .columns = operand(frame, TABLE)->dims[1],
               .num_pages = operand(frame, K)->dims[0],
               .hidden = result(frame, 0),
               .k = result(frame, 1),
               .v = result(frame, 2),
               .choices = result(frame, 3)}};
  for (int i = 0; i < layers; i++) e.model.sparse_layers += layer[i].router != NULL;
  if (e.call.k != operand(frame, K)->data || e.call.v != operand(frame, V)->data)
    return failure(frame, "rome_native_extend: the pages are not updated in place");
  const char *wrong = check_call(&e.model, &e.call);
  if (wrong) return failure(frame, wrong);
  with_team(frame, (int)sizes[11], extend_body, &e);
  return e.done ? NULL : failure(frame, "rome_native_extend: out of memory");
}

struct heading {
  const XLA_FFI_CallFrame *frame;
  int done;
};

static void head_body(void *arg, struct team *team, int workers) {
  struct heading *h = arg;
  const XLA_FFI_Buffer *hidden = operand(h->frame, 0), *out = h->frame->rets.rets[0];
  h->done = head_logits(operand(h->frame, 2)->data, (int)hidden->dims[1], (int)out->dims[1],
                        hidden->data, operand(h->frame, 1)->data, hidden->dims[0], out->data, team,
                        workers);
}

EXPORT XLA_FFI_Error *rome_native_logits(XLA_FFI_CallFrame *frame) {
  if (asks_version(frame)) return NULL;
  const int64_t *threads = attribute(frame, "threads");
  if (!threads || frame->args.size != 3)
    return failure(frame, "rome_native_logits: arguments are missing");
  struct heading h = {.frame = frame};
  with_team(frame, (int)*threads, head_body, &h);
  return h.done ? NULL : failure(frame, "rome_native_logits: out of memory");
}
