/*
 * A rank that waits looks for messages all the time. With this it waits in the kernel instead, which wakes it at once when
 * one comes: longer each time that none has come, up to LONGEST_MS, as something else may have to be looked after.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SHORTEST_MS = 1 };

static __thread int patience_ms = SHORTEST_MS;

static int note(int events)
{
	if (events)
		patience_ms = SHORTEST_MS;
	else if (patience_ms < LONGEST_MS)
		patience_ms *= 2;
	return events;
}

int poll(struct pollfd *files, nfds_t count, int timeout_ms)
{
	if (timeout_ms)
		return syscall(SYS_poll, files, count, timeout_ms);
	return note(syscall(SYS_poll, files, count, patience_ms));
}

int epoll_wait(int fd, struct epoll_event *events, int count, int timeout_ms)
{
	if (timeout_ms)
		return syscall(SYS_epoll_wait, fd, events, count, timeout_ms);
	return note(syscall(SYS_epoll_wait, fd, events, count, patience_ms));
}
