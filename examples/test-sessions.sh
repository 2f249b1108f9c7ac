#!/usr/bin/env bash
# Walks through a session with curl, and checks that the agent remembers: create, talk, read back, end.
#
#   examples/test-sessions.sh [SERVER]        # default: $HECTOR_SERVER, or http://localhost:8080
set -euo pipefail

SERVER="${1:-${HECTOR_SERVER:-http://localhost:8080}}"

# The member of the JSON document on standard input that a path such as output.content names.
field() {
  python3 -c '
import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1].split("."):
    value = value[key]
print(value)' "$1"
}

# Sends one message into the session, and prints the exchange. The answer is in $ANSWER afterwards.
say() {
  ANSWER=$(curl -fsS -X POST "$SERVER/sessions/$SESSION/tasks" \
    -H "Content-Type: application/json" \
    -d "{\"input\": {\"type\": \"text/plain\", \"content\": \"$1\"}}" | field output.content)
  printf 'you:   %s\nagent: %s\n\n' "$1" "$ANSWER"
}

# Ends with an error unless the last answer contains a word.
expect() {
  case "$ANSWER" in
    *"$1"*) ;;
    *) echo "FAILED: the answer should have said $1" >&2; exit 1 ;;
  esac
}

SESSION=$(curl -fsS -X POST "$SERVER/sessions" \
  -H "Content-Type: application/json" \
  -d '{"agentId": "assistant", "metadata": {"user": "alice"}}' | field sessionId)
echo "session $SESSION"
echo

say "My name is Alice"
say "What is my name?"
expect "Alice"
say "What are AI agents?"
say "Give me 3 examples"
expect "agent"

curl -fsS "$SERVER/sessions/$SESSION" | field lastActivityAt | sed 's/^/last activity: /'
curl -fsS "$SERVER/sessions/$SESSION/messages" | field total | sed 's/^/messages kept: /'

curl -fsS -X DELETE "$SERVER/sessions/$SESSION"
if curl -fs "$SERVER/sessions/$SESSION" > /dev/null; then
  echo "FAILED: the session is still there" >&2
  exit 1
fi
echo "session ended"
