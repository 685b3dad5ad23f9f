"""`rome serve`: the engine behind an OpenAI-compatible HTTP API.

`loop` owns the engine's thread; `schemas` says what comes in, `chat` turns messages into ids,
`plan` a request into the engine's, `replies` its updates into choices, `stream` writes them as
server-sent events; `app` is the FastAPI application and `server` runs it.

Needs the extra `serve` (fastapi, uvicorn, prometheus_client), which is why nothing here is imported
by `rome.rollout`.

Left out, each refused by name with status 400: constrained decoding (`response_format`,
`tool_choice` "required" or by name, `strict` tools), penalties, `echo` and log-probs of prompts,
`best_of`, images and audio, the Responses and Embeddings APIs. One model and one engine a process.
"""
