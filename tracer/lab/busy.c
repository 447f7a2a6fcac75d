/* SPDX-License-Identifier: Apache-2.0
 *
 * PID 1 of a small guest that works: it needs no file system (a guest that has one over 9p cannot be migrated), says
 * that it is there, and writes its 32 MiB over and over, one of them every 20 ms. A CPU that is added is brought
 * online, as udev does elsewhere, and gets a process of its own that does the same. Each says once when it has written
 * all of its memory, and on which CPU.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <unistd.h>

#define MIB (1u << 20)
#define MIBS 32u

static volatile char *memory;

static void write_mib(unsigned turn)
{
	for (unsigned offset = 0; offset < MIB; offset += 4096)
		memory[turn % MIBS * MIB + offset] = (char)turn;
	if (turn == MIBS)
		printf("CPU %d has written it all\n", sched_getcpu());
	usleep(20000);
}

/* Whether CPU 1 is there and has come online now. */
static int brought_online(void)
{
	int file = open("/sys/devices/system/cpu/cpu1/online", O_WRONLY);
	int done = file >= 0 && write(file, "1", 1) == 1;

	if (file >= 0)
		close(file);
	return done;
}

int main(void)
{
	int added = mount("sysfs", "/sys", "sysfs", 0, NULL) != 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	memory = malloc(MIBS * MIB);
	puts("busy");
	for (unsigned turn = 0; memory != NULL; turn++) {
		if (!added && brought_online()) {
			cpu_set_t one;

			added = 1;
			CPU_ZERO(&one);
			CPU_SET(1, &one);
			if (fork() == 0) {
				sched_setaffinity(0, sizeof(one), &one);
				turn = 0;
			}
		}
		write_mib(turn);
	}
	return 1;
}
