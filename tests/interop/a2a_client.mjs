// Clients of the official A2A SDK (the package named first: its 1.x or its 0.3) as a process: lines of its input are
// requests in JSON, lines of its output their answers. What a method takes and gives is JSON as it stands on the wire.
import {createInterface} from 'node:readline';

const name = process.argv[2];
const sdk = {...await import(name), ...await import(`${name}/client`), ...await import(`${name}/client/grpc`)};
const current = 'SendMessageRequest' in sdk; // 1.x has a class for each thing on the wire, 0.3 plain objects
const errors = current ? {...await import(`${name}/errors`), ...await import(`${name}/errors/grpc`)} : sdk;

const read = (type, value) => (current ? sdk[type].fromJSON(value) : value);
const written = (type, value) => (current && value ? sdk[type].toJSON(value) : value);

// A method's request and result in 1.x; without a result: a message's answer, or nothing.
const METHODS = {
  sendMessage: ['SendMessageRequest'],
  sendMessageStream: ['SendMessageRequest', 'StreamResponse'],
  resubscribeTask: ['SubscribeToTaskRequest', 'StreamResponse'],
  getTask: ['GetTaskRequest', 'Task'],
  cancelTask: ['CancelTaskRequest', 'Task'],
  listTasks: ['ListTasksRequest', 'ListTasksResponse'],
  createTaskPushNotificationConfig: ['TaskPushNotificationConfig', 'TaskPushNotificationConfig'],
  setTaskPushNotificationConfig: [], // of 0.3
  getTaskPushNotificationConfig: ['GetTaskPushNotificationConfigRequest', 'TaskPushNotificationConfig'],
  listTaskPushNotificationConfig: ['ListTaskPushNotificationConfigsRequest', 'ListTaskPushNotificationConfigsResponse'],
  deleteTaskPushNotificationConfig: ['DeleteTaskPushNotificationConfigRequest'],
};

const clients = [];
const streams = [];

// A `token` is sent where none is refused with 401, as an application does that logs in when it must.
function fetchWith(token) {
  return sdk.createAuthenticatingFetchWithRetry(fetch, {
    headers: async () => ({}),
    shouldRetryWithHeaders: async (_, {status}) => (status === 401 ? {Authorization: `Bearer ${token}`} : undefined),
  });
}

const actions = {
  async connect({url, path, binding, version, token}) {
    const options = {legacyCompat: {enabled: version === '0.3'}, ...(token && {fetchImpl: fetchWith(token)})};
    const factory = new sdk.ClientFactory({
      transports: [sdk.JsonRpcTransportFactory, sdk.RestTransportFactory, sdk.GrpcTransportFactory].map(
        (Transport) => new Transport(options)),
      preferredTransports: [binding],
      cardResolver: new sdk.DefaultAgentCardResolver(options),
    });
    let client = await factory.createFromUrl(url, path);
    if (current && version === '0.3') { // the card has both versions, of which 1.x takes the new one
      const card = structuredClone(client.agentCard);
      card.supportedInterfaces = card.supportedInterfaces.filter((each) => each.protocolVersion === '0.3');
      client = await factory.createFromAgentCard(card);
    }
    const {protocolName, protocolVersion} = client.transport;
    clients.push(client);
    return {client: clients.length - 1, transport: `${protocolName} ${protocolVersion}`};
  },
  async card({client, headers, verify}) {
    const keyOf = async (id, url) => (await (await fetch(url)).json()).keys.find(({kid}) => kid === id);
    return clients[client].getAgentCard({serviceParameters: headers}, verify && sdk.verifyAgentCardSignature(keyOf));
  },
  async call({client, method, params, headers}) {
    const [request, result] = METHODS[method];
    const value = await clients[client][method](read(request, params), {serviceParameters: headers});
    return written(result ?? ('status' in (value ?? {}) ? 'Task' : 'Message'), value);
  },
  async open({client, method, params, headers}) {
    const value = read(METHODS[method][0], params);
    streams.push(clients[client][method](value, {serviceParameters: headers}));
    return streams.length - 1;
  },
  // The next event; null at the end.
  async next({stream}) {
    const {done, value} = await streams[stream].next();
    return done ? null : written('StreamResponse', value);
  },
  async leave({stream}) {
    await streams[stream].return();
  },
};

function told(error) {
  const kinds = Object.entries(errors).filter(([, kind]) => kind.prototype instanceof Error && error instanceof kind);
  const cause = error.cause instanceof Error ? told(error.cause) : null;
  return {kinds: kinds.map(([kind]) => kind), name: error.name, message: error.message, reason: error.reason, cause};
}

// Nobody waits behind a call that hangs.
createInterface({input: process.stdin}).on('line', async (line) => {
  const {id, action, ...given} = JSON.parse(line);
  const answer = await actions[action](given).then((result) => ({result}), (error) => ({error: told(error)}));
  console.log(JSON.stringify({id, ...answer}));
}).on('close', () => process.exit());
