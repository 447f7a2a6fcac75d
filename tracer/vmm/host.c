/* SPDX-License-Identifier: Apache-2.0 */
/* Settings of the host that a scenario needs. They are put back however the program ends, short of SIGKILL. */
#include "vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct {
	const char *path;
	char value[32];
	size_t length;
} before[MAX_SETTINGS];
static volatile unsigned n_before;

static bool write_setting(const char *path, const char *value, size_t length)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool written = fd >= 0 && write(fd, value, length) == (ssize_t)length;

	close(fd);
	return written;
}

static ssize_t read_text(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);

	close(fd);
	text[n < 0 ? 0 : n] = '\0';
	return n;
}

unsigned long long read_setting(const char *path)
{
	char text[32];

	if (read_text(path, text, sizeof(text)) < 0)
		fail(EXIT_NO_ABILITY, "%s: %s", path, strerror(errno));
	return strtoull(text, NULL, 10);
}

void make_settings(const struct scenario *scenario)
{
	for (unsigned i = 0; i < MAX_SETTINGS && scenario->settings[i].path != NULL; i++) {
		const struct setting *setting = &scenario->settings[i];
		ssize_t n = read_text(setting->path, before[i].value, sizeof(before[i].value));

		if (n < 0)
			fail(EXIT_NO_ABILITY, "scenario %s needs %s: %s", scenario->name, setting->path, strerror(errno));
		before[i].path = setting->path;
		before[i].length = (size_t)n;
		n_before = i + 1;
		if (!write_setting(setting->path, setting->value, strlen(setting->value)))
			fail(EXIT_NO_ABILITY, "scenario %s cannot set %s to %s: run as root, or in the kernel lab", scenario->name,
			     setting->path, setting->value);
	}
}

void put_settings_back(void)
{
	while (n_before > 0) {
		n_before--;
		write_setting(before[n_before].path, before[n_before].value, before[n_before].length);
	}
}
