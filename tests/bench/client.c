/* The load of the bench: one thread, one epoll loop, no dependencies; does one scenario and prints one line of JSON.

   client SCENARIO PORT PID TARGET BODY STREAMS AMOUNT

     burst   STREAMS WebSockets ask at once, each is read to its final chunk, which must have the number AMOUNT + 1
     paced   STREAMS WebSockets, read for AMOUNT milliseconds from the moment when each has had its first chunk
     first   STREAMS WebSockets ask at once and leave when each has had its first chunk; AMOUNT times
     cycles  AMOUNT times: connect, upgrade, ask, read to the final chunk, close; STREAMS at once
     hold    STREAMS WebSockets with a task each; says so when each has had a chunk, and reads until its input ends
     post    AMOUNT times POST BODY to TARGET, over STREAMS connections that stay open
     sse     STREAMS times POST BODY at once, each answer is read to its end and must have AMOUNT pieces of text
     join    as sse, but leaves when it has them
     resume  as join, with the wish to go on behind the event 0
     grpc    STREAMS times a call of the method TARGET with the message BODY at once, all over one connection as clients
             of gRPC do it, each is read to its end, at which it must have had AMOUNT pieces of text

   PID is the server's process, whose CPU time (all its threads) is told for the measured stretch, beside this
   process's own since its start. Times are CLOCK_MONOTONIC. A paced chunk has in its text @ and the time of its tick in
   nanoseconds. A piece of text of `sse` and of what follows it is that or PIECE, so that it does not matter how many of
   them an event has. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PIECE "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"

enum state { UPGRADING, OPEN, HTTP, EVENTS, CALL, CLOSED };

struct connection {
    int fd;
    enum state state;
    uint64_t asked, first; /* when; 0: not yet */
    long chunks, run; /* of the letter that PIECE is made of, at the end of what was read */
    int final, closing;
    char *data; /* read and not understood yet */
    size_t have, room;
};

static const char *scenario, *target, *body;
static int port, pid, streams, epoll;
static long amount;
static struct connection *connections;

/* what has happened since the scenario began to count it */
static long ready, firsts, finals, closed, answers, chunks, events;
static uint64_t *samples;
static size_t sample_count, sample_room;
static int measuring;

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "client %s %s: ", scenario, target);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static double cpu_seconds(void) { /* of the server */
    clockid_t its;
    struct timespec time;
    if (clock_getcpuclockid(pid, &its) || clock_gettime(its, &time)) die("process %d is gone", pid);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void sample(uint64_t value) {
    if (sample_count == sample_room) {
        sample_room = sample_room ? 2 * sample_room : 4096;
        if (!(samples = realloc(samples, sample_room * sizeof *samples))) die("out of memory");
    }
    samples[sample_count++] = value;
}

static int compare(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void print_samples(void) { /* as milliseconds; the percentile is the nearest rank's */
    if (!sample_count) die("nothing was measured");
    qsort(samples, sample_count, sizeof *samples, compare);
    double last = (double)(sample_count - 1);
    printf("\"p50_ms\": %.4f, \"p99_ms\": %.4f, \"max_ms\": %.4f", (double)samples[(size_t)(last * 0.50 + 0.5)] / 1e6,
           (double)samples[(size_t)(last * 0.99 + 0.5)] / 1e6, (double)samples[sample_count - 1] / 1e6);
}

/* --- sending: all is small, so that it must fit into the socket's buffer --- */

static void put(struct connection *each, const char *data, size_t size) {
    ssize_t sent = send(each->fd, data, size, MSG_NOSIGNAL);
    if (sent != (ssize_t)size) die("cannot send: %s", sent < 0 ? strerror(errno) : "the socket is full");
}

static void put_frame(struct connection *each, int opcode, const char *data, size_t size) {
    static const unsigned char mask[4] = {0x37, 0xfa, 0x21, 0x3d};
    char frame[4096];
    size_t head = size < 126 ? 2 : 4;
    if (size + 8 > sizeof frame) die("a message of %zu bytes", size);
    frame[0] = (char)(0x80 | opcode);
    frame[1] = (char)(0x80 | (size < 126 ? size : 126));
    if (size >= 126) frame[2] = (char)(size >> 8), frame[3] = (char)size;
    memcpy(frame + head, mask, 4);
    for (size_t at = 0; at < size; at++) frame[head + 4 + at] = (char)(data[at] ^ mask[at & 3]);
    put(each, frame, head + 4 + size);
}

static void ask(struct connection *each) {
    each->asked = now();
    put_frame(each, 1, body, strlen(body));
}

static void post(struct connection *each, const char *more) {
    char request[8192];
    int size = snprintf(request, sizeof request,
                        "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                        "A2A-Version: 1.0\r\n%sContent-Length: %zu\r\n\r\n%s",
                        target, port, more, strlen(body), body);
    if (size >= (int)sizeof request) die("the body is too long");
    each->asked = now();
    put(each, request, (size_t)size);
}

static void put_http2(struct connection *each, int type, int flags, int stream, const char *data, size_t size) {
    char frame[4096] = {0, (char)(size >> 8), (char)size, (char)type, (char)flags, 0, 0, 0, (char)stream};
    if (size + 9 > sizeof frame) die("a frame of %zu bytes", size);
    memcpy(frame + 9, data, size);
    put(each, frame, size + 9);
}

static void call(struct connection *each, int stream) {
    const char *headers[][2] = {
        {":method", "POST"},     {":scheme", "http"}, {":path", target},
        {":authority", "127.0.0.1"}, {"te", "trailers"},  {"content-type", "application/grpc"},
        {"a2a-version", "1.0"},
    };
    char head[1024], message[4096] = {0}, *at = head;
    size_t size = strlen(body);
    for (size_t n = 0; n < sizeof headers / sizeof *headers; n++) { /* each a literal that is not to be remembered */
        *at++ = 0;
        for (int part = 0; part < 2; part++)
            *at = (char)strlen(headers[n][part]), at = stpcpy(at + 1, headers[n][part]);
    }
    if (size + 5 > sizeof message) die("a message of %zu bytes", size);
    message[3] = (char)(size >> 8), message[4] = (char)size;
    memcpy(message + 5, body, size);
    put_http2(each, 1, 4, stream, head, (size_t)(at - head));
    put_http2(each, 0, 1, stream, message, size + 5);
}

/* --- connections --- */

static void open_connection(struct connection *each, enum state state) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = each};
    int yes = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    char *data = each->data;
    size_t room = each->room;
    memset(each, 0, sizeof *each);
    each->data = data, each->room = room, each->state = state;
    if ((each->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) < 0) die("socket: %s", strerror(errno));
    if (connect(each->fd, (struct sockaddr *)&address, sizeof address)) die("connect: %s", strerror(errno));
    setsockopt(each->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    fcntl(each->fd, F_SETFL, O_NONBLOCK);
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, each->fd, &event)) die("epoll: %s", strerror(errno));
    if (state == UPGRADING) {
        char request[1024];
        int size = snprintf(request, sizeof request,
                            "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
                            target, port);
        put(each, request, (size_t)size);
    } else if (state == CALL) {
        put(each, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24);
        put_http2(each, 4, 0, 0, "\0\4\x7f\xff\xff\xff", 6); /* windows so wide that none has to be opened again */
        put_http2(each, 8, 0, 0, "\x7f\xff\0\0", 4);
    }
}

static void close_connection(struct connection *each) {
    if (each->state == CLOSED) return;
    close(each->fd);
    each->state = CLOSED;
    closed++;
}

static void open_all(enum state state) {
    ready = firsts = finals = closed = events = 0;
    for (int at = 0; at < streams; at++) open_connection(&connections[at], state);
}

/* A Close frame and FIN, as a client does that leaves at once. */
static void leave_all(void) {
    for (int at = 0; at < streams; at++) {
        if (connections[at].state == OPEN) put_frame(&connections[at], 8, "\x03\xe8", 2);
        close_connection(&connections[at]);
    }
}

/* --- understanding what was read; each returns how many bytes it has used --- */

static size_t read_upgrade(struct connection *each) {
    char *end = memmem(each->data, each->have, "\r\n\r\n", 4);
    if (!end) return 0;
    if (each->have < 12 || memcmp(each->data, "HTTP/1.1 101", 12)) die("refused: %.*s", 80, each->data);
    each->state = OPEN;
    ready++;
    if (*scenario == 'c') ask(each);
    return (size_t)(end + 4 - each->data);
}

static void take_ticks(const char *text, size_t size, uint64_t time) {
    const char *end = text + size;
    while ((text = memchr(text, '@', (size_t)(end - text)))) { /* a frame of joined chunks has many */
        uint64_t tick = 0;
        for (text++; text < end && *text >= '0' && *text <= '9'; text++) tick = 10 * tick + (uint64_t)(*text - '0');
        if (!tick) continue;
        chunks++;
        sample(time > tick ? time - tick : 0);
    }
}

static void take_pieces(struct connection *each, const char *text, size_t size, uint64_t time) {
    long before = chunks;
    take_ticks(text, size, time);
    for (size_t at = 0; at < size; at++) {
        each->run = text[at] == *PIECE ? each->run + 1 : 0;
        if (each->run == sizeof PIECE - 1) each->run = 0, chunks++;
    }
    each->chunks += chunks - before;
}

static void take_all(struct connection *each) {
    if (each->chunks != amount) die("an answer of %ld pieces, %ld were asked for", each->chunks, amount);
    finals++;
}

static void take_end(struct connection *each) {
    if (each->state == EVENTS) take_all(each);
    else if (!each->closing) die("the server has closed a connection");
    close_connection(each);
}

static void take_chunk(struct connection *each, const char *text, size_t size, uint64_t time) {
    each->chunks++;
    if (!each->first) each->first = time, firsts++;
    if (measuring) take_ticks(text, size, time);
    if (!memmem(text, size, "\"final\":true", 12)) return;
    if (!memmem(text, size, "\"done\"", 6)) die("a task has failed: %.*s", (int)size, text);
    if (*scenario == 'b') {
        const char *seq = memmem(text, size, "\"seq\":", 6);
        if (!seq || atol(seq + 6) != amount + 1) die("the last chunk is not %ld: %.*s", amount + 1, (int)size, text);
    }
    if (*scenario == 'p' || *scenario == 'h') die("a task has ended early: %.*s", (int)size, text);
    each->final = 1;
    finals++;
    if (*scenario == 'c') put_frame(each, 8, "\x03\xe8", 2), each->closing = 1;
}

static size_t read_frames(struct connection *each, uint64_t time) {
    size_t used = 0;
    while (each->have - used >= 2) {
        const unsigned char *frame = (unsigned char *)each->data + used;
        size_t left = each->have - used, head = 2, size = frame[1] & 0x7f;
        if (frame[1] & 0x80) die("a masked frame");
        if (size == 126) {
            if (left < (head = 4)) break;
            size = (size_t)frame[2] << 8 | frame[3];
        } else if (size == 127) {
            if (left < (head = 10)) break;
            size = 0;
            for (int at = 2; at < 10; at++) size = size << 8 | frame[at];
        }
        if (left - head < size) break;
        const char *payload = (const char *)frame + head;
        int opcode = frame[0] & 0x0f;
        used += head + size;
        if (opcode == 9) put_frame(each, 10, payload, size);
        else if (opcode == 8) {
            if (!each->final) die("the server closes with %d", size < 2 ? 0 : frame[head] << 8 | frame[head + 1]);
            each->closing = 2;
        } else if (opcode == 1) take_chunk(each, payload, size, time);
    }
    return used;
}

static size_t read_response(struct connection *each, uint64_t time) {
    char *end = memmem(each->data, each->have, "\r\n\r\n", 4);
    if (!end) return 0;
    if (each->have < 12 || memcmp(each->data, "HTTP/1.1 2", 10)) die("refused: %.*s", (int)each->have, each->data);
    *end = 0;
    char *length = strcasestr(each->data, "\r\ncontent-length:");
    if (!length) die("a response without Content-Length");
    size_t whole = (size_t)(end + 4 - each->data) + strtoul(length + 17, NULL, 10);
    *end = '\r';
    if (each->have < whole) return 0;
    sample(time - each->asked);
    answers++;
    if (answers + streams <= amount) post(each, "");
    return whole;
}

static size_t read_events(struct connection *each, uint64_t time) {
    size_t used = 0;
    char *end;
    if (each->have >= 10 && !each->first) {
        if (memcmp(each->data, "HTTP/1.1 2", 10)) die("refused: %.*s", (int)each->have, each->data);
        each->first = time, firsts++;
    }
    while ((end = memchr(each->data + used, '\n', each->have - used))) {
        const char *line = each->data + used;
        if (!memcmp(line, "data:", 5)) {
            if (memmem(line, (size_t)(end - line), "\"error\"", 7)) die("an error: %.*s", (int)(end - line), line);
            events++;
            take_pieces(each, line, (size_t)(end - line), time);
        }
        used = (size_t)(end + 1 - each->data);
    }
    if ((*scenario == 'j' || *scenario == 'r') && each->chunks >= amount) take_end(each);
    return used;
}

static size_t read_http2(struct connection *each, uint64_t time) {
    size_t used = 0, size;
    while (each->have - used >= 9) {
        const char *frame = each->data + used;
        size = (size_t)(unsigned char)frame[0] << 16 | (size_t)(unsigned char)frame[1] << 8 | (unsigned char)frame[2];
        if (each->have - used - 9 < size) break;
        int type = frame[3], flags = frame[4], stream = (unsigned char)frame[7] << 8 | (unsigned char)frame[8];
        struct connection *its = &connections[stream / 2 % streams]; /* where what has come of a stream is counted */
        used += 9 + size;
        if (type == 0) take_pieces(its, frame + 9, size, time);
        else if (type == 3 || type == 7) die("the server ends it with a frame of the type %d", type);
        else if ((type == 4 || type == 6) && !(flags & 1)) put_http2(each, type, 1, 0, frame + 9, type == 4 ? 0 : size);
        if (type < 2 && flags & 1) take_all(its);
    }
    return used;
}

static void on_readable(struct connection *each) {
    if (each->room - each->have < 65536) {
        each->room = each->have + 131072;
        if (!(each->data = realloc(each->data, each->room + 1))) die("out of memory");
    }
    ssize_t got = recv(each->fd, each->data + each->have, each->room - each->have, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) {
        take_end(each);
        return;
    }
    uint64_t time = now();
    each->have += (size_t)got;
    each->data[each->have] = 0; /* so that strcasestr and memcmp of a few bytes end */
    size_t used = 0, more;
    do {
        more = 0;
        if (each->state == UPGRADING) more = read_upgrade(each);
        else if (each->state == OPEN) more = read_frames(each, time);
        else if (each->state == HTTP) more = read_response(each, time);
        else if (each->state == EVENTS) more = read_events(each, time);
        else if (each->state == CALL) more = read_http2(each, time);
        used += more;
        each->have -= more;
        memmove(each->data, each->data + more, each->have);
    } while (more && each->have && each->state != CLOSED);
    if (each->closing == 2) close_connection(each);
}

/* One look at all sockets, waiting for at most `limit` nanoseconds. */
static void turn(uint64_t limit) {
    struct epoll_event events[256];
    int count = epoll_wait(epoll, events, 256, (int)((limit + 999999u) / 1000000u));
    if (count < 0 && errno != EINTR) die("epoll: %s", strerror(errno));
    for (int at = 0; at < count; at++)
        if (((struct connection *)events[at].data.ptr)->state != CLOSED) on_readable(events[at].data.ptr);
}

static void turn_until(const long *count, long enough) {
    while (*count < enough) {
        long before = *count;
        uint64_t begun = now();
        while (*count == before) {
            turn(1000000000u);
            if (now() - begun > 300000000000u) die("stuck at %ld of %ld", *count, enough);
        }
    }
}

static void turn_for(uint64_t nanoseconds) {
    uint64_t end = now() + nanoseconds;
    for (uint64_t time = now(); time < end; time = now()) turn(end - time);
}

/* --- the scenarios --- */

static void print_rate(const char *of, long count, uint64_t begun, double cpu) {
    double seconds = (double)(now() - begun) / 1e9;
    printf("\"%s\": %ld, \"seconds\": %.6f, \"cpu_seconds\": %.6f", of, count, seconds, cpu_seconds() - cpu);
    printf(", \"client_seconds\": %.6f", (double)clock() / CLOCKS_PER_SEC);
}

static void burst(void) {
    open_all(UPGRADING);
    turn_until(&ready, streams);
    double cpu = cpu_seconds();
    uint64_t begun = now();
    for (int at = 0; at < streams; at++) ask(&connections[at]);
    turn_until(&finals, streams);
    print_rate("chunks", streams * (amount + 1), begun, cpu);
}

static void ask_and_wait(void) {
    open_all(UPGRADING);
    turn_until(&ready, streams);
    for (int at = 0; at < streams; at++) ask(&connections[at]);
    turn_until(&firsts, streams);
}

static void paced(void) {
    ask_and_wait();
    turn_for(1000000000u);
    double cpu = cpu_seconds();
    uint64_t begun = now();
    measuring = 1;
    turn_for((uint64_t)amount * 1000000u);
    measuring = 0;
    print_rate("chunks", chunks, begun, cpu);
    printf(", ");
    print_samples();
    leave_all();
}

static void first(void) {
    for (long time = 0; time < amount; time++) {
        ask_and_wait();
        for (int at = 0; at < streams; at++) sample(connections[at].first - connections[at].asked);
        leave_all();
        turn_for(20000000u); /* the server finds that they have left */
    }
    print_samples();
}

static void cycles(void) {
    long begun_cycles = streams, ended = 0;
    double cpu = cpu_seconds();
    uint64_t begun = now();
    open_all(UPGRADING);
    while (ended < amount) {
        turn_until(&closed, ended + 1);
        ended = closed;
        for (int at = 0; at < streams && begun_cycles < amount; at++)
            if (connections[at].state == CLOSED) open_connection(&connections[at], UPGRADING), begun_cycles++;
    }
    print_rate("cycles", ended, begun, cpu);
}

static void hold(void) {
    char byte;
    ask_and_wait();
    printf("{\"streams\": %d}\n", streams);
    fflush(stdout);
    fcntl(0, F_SETFL, O_NONBLOCK);
    while (read(0, &byte, 1) < 0 && errno == EAGAIN) turn_for(20000000u);
    leave_all();
}

static void posts(void) {
    open_all(HTTP);
    double cpu = cpu_seconds();
    uint64_t begun = now();
    for (int at = 0; at < streams; at++) post(&connections[at], "");
    turn_until(&answers, amount);
    print_rate("requests", answers, begun, cpu);
    printf(", ");
    print_samples();
}

static void tell_pieces(uint64_t begun, double cpu) {
    turn_until(&finals, streams);
    print_rate("pieces", chunks, begun, cpu);
    printf(", \"events\": %ld", events);
    if (sample_count) printf(", "), print_samples();
}

static void sse(void) {
    open_all(EVENTS);
    turn_for(50000000u); /* connected, and known to the server */
    double cpu = cpu_seconds();
    uint64_t begun = now();
    for (int at = 0; at < streams; at++)
        post(&connections[at], *scenario == 'r'
                                   ? "Accept: text/event-stream\r\nConnection: close\r\nLast-Event-ID: 0\r\n"
                                   : "Accept: text/event-stream\r\nConnection: close\r\n");
    tell_pieces(begun, cpu);
}

static void grpc(void) {
    open_connection(connections, CALL);
    turn_for(50000000u);
    double cpu = cpu_seconds();
    uint64_t begun = now();
    for (int at = 0; at < streams; at++) call(connections, 2 * at + 1);
    tell_pieces(begun, cpu);
}

int main(int count, char **arguments) {
    static const struct { const char *name; void (*run)(void); } all[] = {
        {"burst", burst}, {"paced", paced}, {"first", first}, {"cycles", cycles},
        {"hold", hold},   {"post", posts},  {"sse", sse},     {"join", sse},
        {"resume", sse},  {"grpc", grpc},
    };
    if (count != 8) return fprintf(stderr, "client SCENARIO PORT PID TARGET BODY STREAMS AMOUNT\n"), 2;
    scenario = arguments[1], port = atoi(arguments[2]), pid = atoi(arguments[3]);
    target = arguments[4], body = arguments[5], streams = atoi(arguments[6]), amount = atol(arguments[7]);
    if (streams < 1 || amount < 1 || !(connections = calloc((size_t)streams, sizeof *connections))) return 2;
    if ((epoll = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll: %s", strerror(errno));
    for (size_t at = 0; at < sizeof all / sizeof *all; at++)
        if (!strcmp(all[at].name, scenario)) {
            if (strcmp(scenario, "hold")) putchar('{');
            all[at].run();
            if (strcmp(scenario, "hold")) puts("}");
            return 0;
        }
    return fprintf(stderr, "client: there is no scenario %s\n", scenario), 2;
}
