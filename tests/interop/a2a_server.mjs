// Servers of the official A2A SDK (the package named first: its 1.x or its 0.3) on a free port, whose address is printed;
// a line of the input says what address they have for others. An agent for each binding and version does what its input
// begins with. POST /open/NAME lets a held one go on; GET /stopped/NAME answers once the work of that name was stopped.
import {randomUUID} from 'node:crypto';
import {createInterface} from 'node:readline';
import express from 'express';

const name = process.argv[2];
const sdk = {...await import(name), ...await import(`${name}/server`), ...await import(`${name}/server/express`)};
const current = 'SendMessageRequest' in sdk; // 1.x has a class for each thing on the wire, 0.3 plain objects

// What has a name happens once: who comes early waits.
const happenings = new Map();
function happening(name) {
  if (!happenings.has(name)) {
    let happen;
    happenings.set(name, {happened: new Promise((resolve) => { happen = resolve; }), happen});
  }
  return happenings.get(name);
}

const KINDS = { // of 1.x, and what 0.3 calls them
  task: ['Task', 'task'],
  message: ['Message', 'message'],
  statusUpdate: ['TaskStatusUpdateEvent', 'status-update'],
  artifactUpdate: ['TaskArtifactUpdateEvent', 'artifact-update'],
};

function speaker(bus, {taskId, contextId}) {
  const publish = (kind, value) => {
    const [type, old] = KINDS[kind];
    bus.publish(current ? sdk.AgentEvent[kind](sdk[type].fromJSON(value)) : {kind: old, ...value});
  };
  const parts = (text) => (current ? [{text}] : [{kind: 'text', text}]);
  const message = (text) => ({messageId: randomUUID(), contextId, role: current ? 'ROLE_AGENT' : 'agent',
    parts: parts(text), ...(!current && {kind: 'message'})});
  const status = (state, text) => ({state: current ? `TASK_STATE_${state.toUpperCase().replace('-', '_')}` : state,
    timestamp: new Date().toISOString(), ...(text && {message: {...message(text), taskId}})});
  return {
    task: () => publish('task', {id: taskId, contextId, status: status('submitted')}),
    message: (text) => publish('message', message(text)),
    status: (state, text) => publish('statusUpdate', {taskId, contextId, status: status(state, text),
      ...(!current && {final: !['submitted', 'working'].includes(state)})}),
    text: (text, append = true) => publish('artifactUpdate', {taskId, contextId, append,
      artifact: {artifactId: 'r', parts: parts(text)}}),
    picture: () => publish('artifactUpdate', {taskId, contextId, artifact: {artifactId: 'p', name: 'Picture',
      parts: [current ? {raw: 'AP8=', mediaType: 'image/png'}
        : {kind: 'file', file: {bytes: 'AP8=', mimeType: 'image/png'}}]}}),
  };
}

class Executor {
  running = new Map(); // tasks that wait to be stopped, and their names

  async execute(context, bus) {
    const say = speaker(bus, context);
    const [part] = context.userMessage.parts;
    const text = current ? part.content.value : part.text;
    const [word, which] = text.split(' ');
    if (word === 'message') {
      say.message('a bare message');
      return bus.finished();
    }
    if (current || !context.task) say.task();
    say.status('working', 'thinking');
    if (context.task) {
      say.text(`answered ${text}`, false);
      say.status('completed');
    } else if (word === 'ask') {
      say.status('input-required', 'Which?');
    } else if (word === 'fail') {
      say.status('failed', 'broken');
    } else if (word === 'throw') {
      throw new Error('a bug');
    } else if (word === 'reject') {
      say.status('rejected', 'not mine');
    } else if (word === 'hold') {
      say.text('one ', false);
      await happening(`open ${which}`).happened;
      say.text('two ');
      await happening(`open ${which}!`).happened;
      say.text('three');
      say.status('completed');
    } else if (word === 'wait') {
      this.running.set(context.taskId, which);
      say.text('waiting ', false);
      await happening(`stopped ${which}`).happened;
      say.status('canceled');
    } else {
      ['You ', 'said: ', text].forEach((each, n) => say.text(each, n > 0));
      say.picture();
      say.status('completed');
    }
    bus.finished();
  }

  cancelTask = async (taskId, bus) => {
    if (this.running.has(taskId)) happening(`stopped ${this.running.get(taskId)}`).happen();
  };
}

const AGENTS = { // what they speak, and what their cards say of it
  rpc: ['JSONRPC', '1.0'],
  http: ['HTTP+JSON', '1.0'],
  rpc03: ['JSONRPC', '0.3'],
  http03: ['HTTP+JSON', '0.3'],
  plain: ['JSONRPC', '1.0', false],
};

function cardOf(url, binding, version, streaming) {
  const card = {
    name: 'sdk', description: 'The official SDK', version: '1.0.0', capabilities: {streaming},
    defaultInputModes: ['text/plain'], defaultOutputModes: ['text/plain'],
    skills: [{id: 's', name: 's', description: 's', tags: ['t']}],
  };
  if (!current) return {...card, url, preferredTransport: binding, protocolVersion: '0.3.0'};
  return sdk.AgentCard.fromJSON({...card,
    supportedInterfaces: [{url, protocolBinding: binding, protocolVersion: version}]});
}

const app = express();
app.post('/open/:name', (request, response) => {
  happening(`open ${request.params.name}`).happen();
  response.json(true);
});
app.get('/stopped/:name', async (request, response) => {
  await happening(`stopped ${request.params.name}`).happened;
  response.json(true);
});
const server = app.listen(0, '127.0.0.1', () => console.log(`listening http://127.0.0.1:${server.address().port}`));
createInterface({input: process.stdin}).on('line', (base) => {
  for (const [path, [binding, version, streaming = true]] of Object.entries(AGENTS)) {
    if (!current && version !== '0.3') continue;
    const card = cardOf(`${base}/${path}`, binding, version, streaming);
    const requestHandler = new sdk.DefaultRequestHandler(card, new sdk.InMemoryTaskStore(), new Executor());
    const legacyCompat = {enabled: version === '0.3'};
    const options = {requestHandler, userBuilder: sdk.UserBuilder.noAuthentication, legacyCompat};
    app.use(`/${path}/.well-known/agent-card.json`,
      sdk.agentCardHandler({agentCardProvider: requestHandler, legacyCompat}));
    app.use(`/${path}`, binding === 'JSONRPC' ? sdk.jsonRpcHandler(options) : sdk.restHandler(options));
  }
  console.log('ready');
}).on('close', () => process.exit());
