// Talks to a hector server from a browser or from Node: one file, no dependencies, no build step. Copy it.
//
//   import {Hector} from './hector.js';
//   const hector = new Hector('http://localhost:8080');
//   for await (const chunk of hector.stream('assistant', 'Hello')) {
//     if (chunk.chunkType === 'text') console.log(chunk.content);
//   }
//
// A stream survives: when its connection is cut, or the server restarts, it connects again and goes on where it broke,
// so that each chunk comes exactly once. Leaving the loop before the end (break, return, throw) cancels the task.
//
// Browsers, and Node 22 and later. Before that: npm install ws, and new Hector(url, {WebSocket: (await import('ws')).WebSocket}).

const RECONNECT_LIMIT = 60_000;  // ms that a stream tries to mend its connection without getting any further
const FIRST_TRIES = 3;           // so often is the first connection tried
const FIRST_DELAY = 100;         // ms, about, before a lost connection is made again; each further time twice as many
const MAX_DELAY = 5_000;
const CONNECT_LIMIT = 10_000;    // ms that connecting may take
const SILENCE = 20_000;          // ms without a word after which a connection counts as lost
const HELD = 10_000;             // ms that a connection has to hold to count as mended though no chunk came
const GRACE = 30_000;            // ms that the server is asked to wait for a stream whose connection is lost
const LEAVE_LIMIT = 2_000;       // ms that leaving may take, to cancel the task
const WINDOW = 256;              // chunks that wait here for a slow reader; the others wait on the server

/** What the server refuses, or why a stream could not be mended: `code`, `status` (HTTP), `closeCode` (WebSocket). */
export class HectorError extends Error {
  constructor(code, detail, more = {}) {
    super(detail || code);
    this.name = 'HectorError';
    Object.assign(this, {code, ...more});
  }
}

/** The bytes of a chunk that has a `mediaType`, whichever way they came. */
export const bytesOf = (chunk) => chunk.content instanceof Uint8Array
  ? chunk.content
  : Uint8Array.from(atob(chunk.content), (character) => character.charCodeAt(0));

/** One server. `token` is sent with everything; `reconnectLimit` in ms, 0: streams are not mended. */
export class Hector {
  constructor(url, {token, WebSocket = globalThis.WebSocket, reconnectLimit = RECONNECT_LIMIT} = {}) {
    this.url = url.replace(/\/+$/, '');
    Object.assign(this, {token, WebSocket, reconnectLimit});
  }

  /** Any request of the REST interface: the answer's JSON. Throws HectorError for a refusal. */
  async request(method, path, body, {headers = {}, ...options} = {}) {
    let response, text;
    try {
      response = await fetch(this.url + path, {
        method,
        headers: {
          ...(body !== undefined && {'Content-Type': 'application/json'}),
          ...(this.token && {Authorization: `Bearer ${this.token}`}),
          ...headers,
        },
        body: body === undefined ? undefined : JSON.stringify(body),
        ...options,
      });
      text = await response.text();
    } catch (error) {
      throw new HectorError('connection_failed', `Cannot reach ${this.url}: ${error.cause?.message || error.message}`,
        {retryable: true});
    }
    if (response.ok) return text ? JSON.parse(text) : null;
    let problem = {};
    try { problem = JSON.parse(text); } catch { /* it is not from a hector server, but from a proxy before it */ }
    throw new HectorError(problem.code ?? `http_${response.status}`, problem.detail, {
      status: response.status,
      retryable: problem.retryable ?? [429, 502, 503, 504].includes(response.status),
      taskId: problem.taskId,
    });
  }

  /** Begins a conversation: pass its `sessionId` to `stream`. */
  createSession(agentId, options = {}) {
    return this.request('POST', '/sessions', {agentId, ...options});
  }

  /** Answers a task that waits for input; resolves to the task when it has ended, or asks again. */
  answer(agentId, taskId, content) {
    return this.request('POST', `${taskPath(agentId, taskId)}/input`, {input: inputOf(content)});
  }

  /** Cancels a task; resolves to the task, ended. */
  cancel(agentId, taskId, options) {
    return this.request('POST', `${taskPath(agentId, taskId)}/cancel`, undefined, options);
  }

  /** Runs an agent. `content`: text, `{type, content}`, or anything that JSON can say; `options`: `sessionId`, `taskId`
   *  (one that was not used before), `binary`, `window`, and the members of a task request (`parameters`, `timeoutMs`,
   *  `multitask`, `onDisconnect`: by default the task runs on for 30 s without its stream). */
  stream(agentId, content, options = {}) {
    return new Stream(this, agentId, content, options);
  }
}

/** The chunks of one task, each exactly once: an async iterator. Made by `Hector.stream`.
 *
 *  Adjacent text may come joined, from `firstSeq` to `seq`. Iterating throws HectorError when the task is refused, or
 *  when the connection cannot be mended. */
class Stream {
  /** The number of the last chunk that was given out, and the final chunk once it was. */
  lastSeq = 0;
  final = null;
  /** As far as chunks were given out; while it is `input_required`, `prompt` is what the task asks. */
  status = 'pending';
  prompt = null;

  #hector; #agentId; #task; #window;
  #socket = null;     // the connection, once it is open
  #hangUp = null;     // ends the connection that is there, or the wait for the next one
  #said = false;      // whether the task was ever asked for
  #known = false;     // whether the server has accepted it, as far as was heard
  #attached = false;  // whether it is followed on this connection
  #reached = 0;       // the last chunk that came
  #chunks = [];       // those that wait for the reader
  #unread = 0;        // those of earlier connections: this one gets no credit for them
  #owed = 0;          // chunks that were taken and are not credited yet
  #cancel = null;     // {frame, said, done}
  #answer = null;     // {content, asked, said, unsure, resolve, reject}
  #detached = null;   // {said, done, resolve, reject}
  #leaving = false;
  #over = false;      // the final chunk has come, or a refusal, or the task is no longer followed
  #ended = false;     // nothing comes any more
  #error = null;
  #waiting = [];

  constructor(hector, agentId, content, {sessionId, context, window = WINDOW, binary, ...request}) {
    this.#hector = hector;
    this.#agentId = agentId;
    this.#window = window;
    this.#task = {
      taskId: newId(),
      input: inputOf(content),
      ...(hector.reconnectLimit > 0 && {onDisconnect: {graceMs: GRACE}}),
      ...request,
      ...((sessionId || context) && {context: {...context, ...(sessionId && {sessionId})}}),
      ...(binary && {binary}),
    };
    this.#run();
  }

  get taskId() { return this.#task.taskId; }

  // --- for who reads

  [Symbol.asyncIterator]() { return this; }

  async next() {
    while (!this.#chunks.length) {
      if (this.#error) {
        const error = this.#error;
        this.#error = null;
        throw error;
      }
      if (this.#ended) return {done: true, value: undefined};
      await this.#moved();
    }
    const chunk = this.#chunks.shift();
    this.lastSeq = chunk.seq;
    const asks = chunk.chunkType === 'metadata' && chunk.content?.status === 'input_required';
    this.prompt = asks ? chunk.content.prompt : null;
    this.status = asks ? 'input_required' : 'running';
    if (chunk.final) {
      this.final = chunk;
      this.status = chunk.status;
    }
    if (this.#unread) this.#unread -= 1;
    else this.#owed += 1;
    this.#speak();
    return {done: false, value: chunk};
  }

  /** Leaves: what a `for await` does that ends early. Cancels the task, unless it has ended, was detached, or was asked
   *  for with `onDisconnect: 'continue'`. */
  async return() {
    await this.#leave();
    return {done: true, value: undefined};
  }

  /** Calls `callback` with each chunk, and waits for what it returns; resolves to the final chunk. */
  async each(callback) {
    for await (const chunk of this) await callback(chunk);
    return this.final;
  }

  /** Asks the server to cancel the task; its final chunk is still to come. */
  cancel(reason) {
    this.#cancel ??= {frame: {type: 'cancel', taskId: this.taskId, ...(reason && {reason})}, said: false};
    this.#speak();
  }

  /** Answers what the task asks (`prompt`); resolves when the server has taken it, or the task has ended. */
  answer(content) {
    if (this.#over || this.#ended || this.#answer) {
      return Promise.reject(new HectorError('not_waiting', `Task ${this.taskId} does not wait for an answer`));
    }
    return new Promise((resolve, reject) => {
      this.#answer = {content: inputOf(content), asked: this.#reached, said: false, resolve, reject};
      this.#speak();
    });
  }

  /** Stops following, so that the task runs on without this stream; resolves when the server knows. */
  detach() {
    if (this.#ended) return Promise.resolve();
    if (!this.#detached) {
      this.#detached = {said: false};
      this.#detached.done = new Promise((resolve, reject) => Object.assign(this.#detached, {resolve, reject}));
      this.#speak();
    }
    return this.#detached.done;
  }

  async #leave() {
    if (this.#ended || this.#leaving) return;
    this.#leaving = true;
    this.#chunks = [];
    if (!this.#over && this.#task.onDisconnect !== 'continue') {
      let late = false;
      const timer = setTimeout(() => { late = true; this.#wake(); }, LEAVE_LIMIT);
      this.cancel();
      // A server that is told it and left at once may not get to hear it.
      while (this.#attached && !this.#cancel.done && !this.#over && !late) await this.#moved();
      clearTimeout(timer);
      if (!this.#cancel.done && !this.#over && !late) {
        // There is no connection to say it on. The task may not be there, or the server out of reach: the grace ends it.
        const signal = AbortSignal.timeout(LEAVE_LIMIT);
        await this.#hector.cancel(this.#agentId, this.taskId, {keepalive: true, signal}).catch(() => {});
      }
    }
    this.#hangUp?.();
  }

  // --- the connections: one, and whenever it is lost, another

  async #run() {
    const limit = this.#hector.reconnectLimit;
    let opened = false;
    let tries = 0;
    let spent = 0;
    let failed = 0;
    while (!this.#over && !this.#leaving) {
      const reached = this.#reached;
      const connection = await this.#connection();
      if (this.#over || this.#leaving) break;
      if (this.#reached > reached || connection.held >= HELD || (!opened && connection.opened)) tries = spent = 0;
      opened ||= connection.opened;
      tries += 1;
      // A device that slept meanwhile has not tried all the time.
      spent += tries > 1 ? Math.min(performance.now() - failed, CONNECT_LIMIT + MAX_DELAY) : 0;
      failed = performance.now();
      let error = connection.error ?? (connection.opened ? null : await this.#reasonOfRefusal());
      const delay = (0.5 + Math.random() / 2) * Math.min(MAX_DELAY, FIRST_DELAY * 2 ** (tries - 1));
      const mends = error ? error.retryable : canBeMended(connection.code);
      error ??= lost(this.#url, connection);
      const hopeless = !opened && (tries >= FIRST_TRIES || error.status);
      if (!mends || limit === 0 || hopeless || spent + delay > limit) {
        this.#error = error;
        if (mends && opened && limit > 0) {
          this.#error.message += `; not mended in ${Math.round(spent / 1000)} seconds, at try ${tries}`;
        }
        break;
      }
      if (this.#leaving) break;
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, delay);
        this.#hangUp = () => { clearTimeout(timer); resolve(); };
      });
    }
    this.#ended = true;
    this.#hangUp = null;
    if (this.#error) {
      this.#answer?.reject(this.#error);
      this.#detached?.reject(this.#error);
    }
    this.#answer?.resolve();
    this.#detached?.resolve();
    this.#wake();
  }

  get #url() {
    return `${this.#hector.url.replace(/^http/, 'ws')}/agents/${encodeURIComponent(this.#agentId)}/stream`;
  }

  /** One connection; resolves when it is over, to `{opened, held, code, reason, error}`. Never rejects. */
  #connection() {
    return new Promise((resolve) => {
      const {WebSocket, token} = this.#hector;
      const socket = new WebSocket(this.#url, token ? ['bearer', token] : []);
      socket.binaryType = 'arraybuffer';
      let opened = false;
      let heard = performance.now();
      let asked = false;
      let followed = null;

      const end = (outcome) => {
        clearInterval(watch);
        socket.onopen = socket.onmessage = socket.onclose = null;
        socket.onerror = () => {};  // a socket that is closed while it connects complains
        try { socket.close(); } catch { /* it is closed */ }
        this.#socket = this.#hangUp = null;
        this.#attached = false;
        this.#wake();
        resolve({opened, held: followed === null ? 0 : heard - followed, ...outcome});
      };
      this.#hangUp = () => end({code: 1000});

      // A connection that is dead need not say so: after half of the time it is asked for a sign of life.
      const watch = setInterval(() => {
        const silent = performance.now() - heard;
        if (silent >= (opened ? SILENCE : CONNECT_LIMIT)) {
          end({code: 1006, reason: opened ? 'nothing was heard any more' : 'no answer in time'});
        } else if (opened && silent >= SILENCE / 2 && !asked) {
          asked = true;
          socket.send('{"type":"ping"}');
        }
      }, 1_000);

      socket.onopen = () => {
        opened = true;
        heard = performance.now();
        this.#socket = socket;
        this.#begin();
      };
      socket.onmessage = ({data}) => {
        heard = performance.now();
        asked = false;
        try {
          this.#take(data);
          this.#wake();
        } catch (error) {
          end({error: error instanceof HectorError ? error : new HectorError('unexpected_answer', String(error))});
          return;
        }
        if (this.#attached) followed ??= heard;
        if (this.#over) end({code: 1000});
        else this.#speak();
      };
      // A close follows, and says what there is to say; where Node forgets it, the error is all there is.
      socket.onerror = () => setTimeout(() => socket.onclose?.({code: 1006, reason: ''}), opened ? 1_000 : 0);
      socket.onclose = ({code, reason}) => end({code, reason});
    });
  }

  /** A browser does not tell why a WebSocket was refused: another request does. */
  async #reasonOfRefusal() {
    try {
      const signal = AbortSignal.timeout(CONNECT_LIMIT);
      await this.#hector.request('GET', `/agents/${encodeURIComponent(this.#agentId)}`, undefined, {signal});
    } catch (error) {
      return error;
    }
    return null;
  }

  // --- what is said

  /** Whether a task that was asked for has arrived cannot be known when the connection breaks right after it, and to
   *  name one that has ended starts a new one. So only the first connection begins with it; the others attach, which
   *  starts nothing, and only where the server does not know the task it is asked for again. */
  #begin() {
    this.#unread = this.#chunks.length;
    this.#owed = 0;
    if (this.#answer) this.#answer.unsure = this.#answer.said;
    if (this.#detached) this.#detached.said = false;
    if (this.#cancel) this.#cancel.said = false;
    const {binary} = this.#task;
    const window = this.#window;
    if (!this.#said) this.#ask();
    else this.#send({type: 'attach', taskId: this.taskId, after: this.#reached, window, ...(binary && {binary})});
  }

  #ask() {
    this.#said = this.#attached = true;
    this.#send({...this.#task, window: this.#window});
    this.#speak();
  }

  /** Says what is due, if there is somebody who understands it. */
  #speak() {
    if (!this.#attached || !this.#socket) return;
    const {taskId} = this;
    if (this.#cancel && !this.#cancel.said) {
      this.#cancel.said = true;
      this.#send(this.#cancel.frame);
    }
    if (this.#answer && !this.#answer.said) {
      this.#answer.said = true;
      this.#send({type: 'input', taskId, input: this.#answer.content});
    }
    if (this.#detached && !this.#detached.said) {
      this.#detached.said = true;
      this.#send({type: 'detach', taskId});
    }
    if (2 * this.#owed >= this.#window) {
      this.#send({type: 'credit', taskId, frames: this.#owed});
      this.#owed = 0;
    }
  }

  #send(frame) { this.#socket.send(JSON.stringify(frame)); }

  // --- what was said

  #take(data) {
    const frame = typeof data === 'string' ? JSON.parse(data) : binaryChunk(data);
    if (frame.type !== undefined) {
      this.#control(frame);
      return;
    }
    if (frame.seq === 0) {
      if (frame.code === 'draining' && this.#known) return;  // a close with 1012 follows, and the next connection goes on
      this.#over = true;
      this.#error = new HectorError(frame.code, frame.content, {retryable: frame.retryable, taskId: this.taskId});
      return;
    }
    let first = frame.firstSeq ?? frame.seq;
    if (first > this.#reached + 1) first = frame.content?.gap?.from ?? first;  // what the server no longer holds
    if (first !== this.#reached + 1 || frame.seq < first) {
      throw new HectorError('unexpected_answer', `chunk ${first} to ${frame.seq} came after ${this.#reached}`);
    }
    this.#reached = frame.seq;
    this.#known = this.#attached = true;
    this.#over = frame.final;
    if (!this.#leaving) this.#chunks.push(frame);
  }

  #control(frame) {
    const error = frame.type === 'error'
      ? new HectorError(frame.code, frame.detail, {retryable: RETRYABLE.includes(frame.code), taskId: this.taskId})
      : null;
    if (frame.of === 'attach') {
      if (error && (frame.code !== 'task_not_found' || this.#known)) throw error;
      this.#attached = true;
      if (error) {
        this.#ask();
      } else {
        this.#known = true;
        const answer = this.#answer;
        if (answer?.unsure) {
          // The server's word on it was lost. Had the answer not come, all would be as it was.
          if (frame.status === 'input_required' && frame.lastSeq === answer.asked) answer.said = answer.unsure = false;
          else this.#settle('resolve');
        }
      }
    } else if (frame.of === 'input') {
      // A server that shuts down ends the connection soon, and the next one is asked.
      if (frame.code !== 'draining') this.#settle(error ? 'reject' : 'resolve', error);
    } else if (error && frame.of !== 'credit') {
      throw error;
    } else if (frame.of === 'detach') {
      this.#over = true;
    } else if (frame.of === 'cancel') {
      this.#cancel.done = true;
    }
  }

  #settle(how, error) {
    const answer = this.#answer;
    this.#answer = null;
    answer?.[how](error);
  }

  #moved() { return new Promise((resolve) => this.#waiting.push(resolve)); }

  #wake() {
    for (const resolve of this.#waiting.splice(0)) resolve();
  }
}

const RETRYABLE = ['rate_limited', 'store_unavailable', 'draining'];

/** 1001, 1006, 1012, 1013 and 4000-4499 are the protocol's; 1000 and 1005 before the final chunk are a proxy's, 1014 is
 *  its upstream's cut; and 1011, a fault in the server, ends a connection while the task goes on. */
const canBeMended = (code) =>
  [1000, 1001, 1005, 1006, 1011, 1012, 1013, 1014].includes(code) || (code >= 4000 && code < 4500);

const lost = (url, {opened, code, reason}) => new HectorError('connection_failed',
  `${opened ? `${url}: lost before the end` : `Cannot reach ${url}`} (${code}${reason ? `: ${reason}` : ''})`,
  {closeCode: code, retryable: true});

const taskPath = (agentId, taskId) => `/agents/${encodeURIComponent(agentId)}/tasks/${encodeURIComponent(taskId)}`;

const inputOf = (content) => {
  if (typeof content === 'string') return {type: 'text/plain', content};
  if (typeof content?.type === 'string' && ('content' in content || 'uploadId' in content)) return content;
  return {type: 'application/json', content};
};

/** `randomUUID` is only there on pages that came over https or from this machine. */
const newId = () => crypto.randomUUID?.()
  ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, '0')).join('');

/** Version 1, flags, length and task id, seq (8 bytes), length and media type, payload. */
const binaryChunk = (buffer) => {
  const view = new DataView(buffer);
  const text = (at, size) => new TextDecoder().decode(new Uint8Array(buffer, at, size));
  if (view.getUint8(0) !== 1) throw new HectorError('unexpected_answer', 'a binary frame of another version');
  const idSize = view.getUint8(2);
  const seq = Number(view.getBigUint64(3 + idSize));
  const typeSize = view.getUint8(11 + idSize);
  return {
    taskId: text(3, idSize), seq, chunkType: 'data', content: new Uint8Array(buffer, 12 + idSize + typeSize),
    mediaType: text(12 + idSize, typeSize), final: false,
  };
};
