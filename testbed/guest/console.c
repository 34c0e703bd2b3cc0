/* Commands are lines on the serial port, answers lines that begin with `@`. Every answer starts on a line of its own,
 * whatever the kernel or a half-sent answer from before a snapshot left on the wire. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

#include "guest.h"

#ifdef __aarch64__
#define CONSOLE "/dev/ttyAMA0"
#else
#define CONSOLE "/dev/ttyS0"
#endif

int console_fd = -1;
static char output[1 << 16], line[256], finish_tag[32];
static size_t output_bytes, line_bytes;
static bool finish_asked;

void console_open(void) {
    struct termios mode;
    console_fd = open(CONSOLE, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (tcgetattr(console_fd, &mode) < 0) return;
    cfmakeraw(&mode);
    tcsetattr(console_fd, TCSANOW, &mode);
    tcflush(console_fd, TCIFLUSH); /* what came while the kernel booted has lost bytes */
}

/* Drops what does not fit: a console that nobody reads must not stop the traffic. */
static void append(const char *format, ...) {
    va_list arguments;
    size_t space = sizeof output - output_bytes;
    va_start(arguments, format);
    int length = vsnprintf(output + output_bytes, space, format, arguments);
    va_end(arguments);
    if (length > 0 && (size_t)length < space) output_bytes += (size_t)length;
}

void say(const char *format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    append("\n@{%s,\"id\":%lu}\n", text, state ? state->id : 0);
}

bool console_has_output(void) { return output_bytes > 0; }

static void flush_output(void) {
    ssize_t written = output_bytes ? write(console_fd, output, output_bytes) : 0;
    if (written <= 0) return;
    output_bytes -= (size_t)written;
    memmove(output, output + written, output_bytes);
}

static void append_array(const char *name, const uint64_t *values) {
    append(",\"%s\":[", name);
    for (unsigned j = 0; j < state->peers; j++) append(j ? ",%lu" : "%lu", values[j]);
    append("]");
}

static void append_stream(const char *name, const struct stream *stream) {
    const struct mark *mark = &stream->mark[stream->current];
    append(",\"%s\":{\"peer\":%lu,\"phase\":%lu,\"bytes\":%lu,\"digest_bytes\":%lu,\"digest\":\"", name, stream->peer,
           stream->phase, stream->bytes, mark->bytes);
    for (int i = 0; i < 32; i++) append("%02x", mark->digest[i]);
    append("\"}");
}

static void append_counters(void) {
    append("\"id\":%lu,\"peers\":%lu,\"nonce\":\"%016lx\",\"ready\":%s", state->id, state->peers, state->nonce,
           state->ready ? "true" : "false");
    append(",\"ticks\":%lu,\"uptime_ms\":%lu,\"stamp_pages\":%lu,\"touched\":%lu,\"touching\":%lu,\"stamp_errors\":%lu",
           state->ticks, state->uptime_ms, state->stamp_pages, state->touched, state->touching, state->stamp_errors);
    append(",\"send_errors\":%lu,\"stream_errors\":%lu,\"streams_completed\":%lu,\"streams_matched\":%lu",
           state->send_errors, state->stream_errors, state->streams_completed, state->streams_matched);
    append_array("sent", state->sent), append_array("received", state->received);
    append_array("highest", state->highest), append_array("duplicates", state->duplicates);
    append_array("reordered", state->reordered), append_array("skipped", state->skipped);
    append_array("stale", state->stale), append_array("foreign", state->foreign);
    append_stream("outgoing", &state->outgoing), append_stream("incoming", &state->incoming);
}

static void answer_counters(const char *name, const char *tag) {
    append("\n@{\"%s\":{", name);
    append_counters();
    append("},\"tag\":\"%s\"}\n", tag);
}

static void answer_ok(const char *tag) { append("\n@{\"ok\":true,\"tag\":\"%s\"}\n", tag); }

static void quiet(void) {
    int fd = open("/proc/sys/kernel/printk", O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, "1", 1) < 0) say("\"warning\":\"printk: %s\"", strerror(errno));
    if (fd >= 0) close(fd);
}

static void obey(const char *command, const char *tag) {
    if (!strcmp(command, "status")) {
        answer_counters("status", tag);
        return;
    }
    if (!strcmp(command, "finish")) {
        tcp_finish();
        finish_asked = true;
        snprintf(finish_tag, sizeof finish_tag, "%s", tag);
        return;
    }
    if (!strncmp(command, "rate ", 5)) stamps_set_rate(strtol(command + 5, NULL, 10));
    else if (!strcmp(command, "udp on") || !strcmp(command, "udp off")) udp_set_on(command[5] == 'n');
    else if (!strcmp(command, "quiet")) quiet();
    else if (!strcmp(command, "poweroff")) reboot(RB_POWER_OFF);
    else {
        append("\n@{\"error\":\"unknown command\",\"tag\":\"%s\"}\n", tag);
        return;
    }
    answer_ok(tag);
}

/* `command #tag`: the tag comes back in the answer. It is quoted as it is, so only plain ones are taken. */
static void obey_line(void) {
    char *tag = strstr(line, " #");
    if (tag) *tag = 0, tag += 2;
    if (tag && tag[strspn(tag, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")]) tag = NULL;
    if (*line) obey(line, tag ? tag : "");
}

static void take_byte(char byte) {
    if (byte != '\n' && byte != '\r') {
        if (line_bytes < sizeof line - 1) line[line_bytes++] = byte;
        return;
    }
    line[line_bytes] = 0;
    line_bytes = 0;
    obey_line();
}

void console_work(short events) {
    char bytes[64];
    ssize_t got = events & ~POLLOUT ? read(console_fd, bytes, sizeof bytes) : 0;
    for (ssize_t i = 0; i < got; i++) take_byte(bytes[i]);
    if (finish_asked && tcp_finished()) {
        finish_asked = false;
        answer_counters("finished", finish_tag);
    }
    flush_output();
}
