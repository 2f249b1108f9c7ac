// Talks to an agent from Node: a session, and answers that stream.
//
//   node examples/node_client.mjs [SERVER]
//
// Node 22 and later need nothing else; before that: npm install ws

const server = (process.argv[2] ?? process.env.HECTOR_SERVER ?? 'http://localhost:8080').replace(/\/$/, '');
const WebSocket = globalThis.WebSocket ?? (await import('ws')).WebSocket;

/** The session's conversation goes on with `prompt`; prints the answer as it comes, resolves to the final chunk. */
const ask = (sessionId, prompt) => new Promise((resolve, reject) => {
  process.stdout.write(`\nyou:   ${prompt}\nagent: `);
  const ws = new WebSocket(`${server.replace(/^http/, 'ws')}/agents/assistant/stream`);

  ws.onopen = () => ws.send(JSON.stringify({
    input: {type: 'text/plain', content: prompt},
    context: {sessionId},
  }));

  ws.onmessage = (event) => {
    const chunk = JSON.parse(event.data);
    if (chunk.chunkType === 'text') process.stdout.write(chunk.content);
    if (chunk.chunkType === 'error') process.stdout.write(`[${chunk.code}: ${chunk.content}]`);
    if (chunk.final) {
      process.stdout.write('\n');
      resolve(chunk);
      ws.close();
    }
  };

  // After `resolve` this changes nothing.
  ws.onerror = () => reject(new Error('the connection failed'));
  ws.onclose = (event) => reject(new Error(`the connection was closed with ${event.code} before the final chunk`));
});

const api = async (method, path, body) => {
  const response = await fetch(server + path, {method, body: body && JSON.stringify(body)});
  if (!response.ok) throw new Error(`${method} ${path}: ${(await response.json()).detail}`);
  return response.status === 204 ? null : response.json();
};

const session = await api('POST', '/sessions', {agentId: 'assistant', metadata: {client: 'node'}});
for (const prompt of ['My name is Alice', 'What is my name?', 'What are AI agents?', 'Give me 3 examples']) {
  const final = await ask(session.sessionId, prompt);
  if (final.status !== 'completed') process.exitCode = 1;
}
const {total} = await api('GET', `/sessions/${session.sessionId}/messages`);
console.log(`\n${total} messages in session ${session.sessionId}`);
await api('DELETE', `/sessions/${session.sessionId}`);
