# A foreign agent in bash alone: HTTP over /dev/tcp. `ask BODY` prints status and body of the answer.
ask() {
  local rest=${OPENAI_BASE_URL#http://} host path body=$1 LC_ALL=C
  host=${rest%%/*}
  path=/${rest#*/}/chat/completions
  exec 3<>"/dev/tcp/${host%:*}/${host#*:}"
  printf 'POST %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s' \
    "$path" "$host" "$OPENAI_API_KEY" "${#body}" "$body" >&3
  cat <&3
  exec 3>&-
}
say() { ask "{\"model\": \"$OPENAI_MODEL\", \"messages\": [{\"role\": \"user\", \"content\": \"$1\"}]}"; }
