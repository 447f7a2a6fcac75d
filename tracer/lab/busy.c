/* SPDX-License-Identifier: Apache-2.0
 *
 * PID 1 of a guest that is migrated while it works: it needs no file system (a guest that has one over 9p cannot be
 * migrated), says that it is there, and writes its 32 MiB over and over, one of them every 20 ms.
 */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define MIB (1u << 20)
#define MIBS 32u

int main(void)
{
	volatile char *memory = malloc(MIBS * MIB);

	puts("busy");
	fflush(stdout);
	for (unsigned turn = 0; memory != NULL; turn++) {
		for (unsigned offset = 0; offset < MIB; offset += 4096)
			memory[turn % MIBS * MIB + offset] = (char)turn;
		usleep(20000);
	}
	return 1;
}
