/* SPDX-License-Identifier: Apache-2.0
 *
 * PID 1 of a lab guest. Loads the modules packed next to it, makes the host's root the guest's root (read-only
 * 9p below, tmpfs above), runs one command of the host's and powers off.
 *
 * It is one static program because a lab then needs neither busybox, kmod nor a disk image. What it is to run is
 * in the share (NUL-separated `argv` and `environ`, `cwd`); what came of it goes back there (`stdout`, `stderr`,
 * `status`, `dmesg`), never over the serial line: QEMU drops what the UART still holds when it exits.
 *
 * Bochs has no 9p: there the share and the host's files come in the initramfs, and what came of it leaves through
 * the port that Bochs copies to its standard output, as "\1FILE NAME SIZE\n" and the bytes.
 *
 * How it ended is reported through QEMU's isa-debug-exit, or as "\1END CODE\n"; the codes are those of
 * tracer/lab/qemu.py.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define SHARE "/mnt/lab"
#define PROBES "/var/cache/kvmtrace/lab-probes"
#define DEBUG_EXIT_PORT 0xf4
#define BOCHS_OUTPUT_PORT 0xe9
#define BOCHS_SHUTDOWN_PORT 0x8900

enum ending {
	ORDERLY = 0,        /* the command ran; `status` says how it ended */
	MODULE_REFUSED = 1, /* a module would not load */
	MOUNT_REFUSED = 2,  /* a file system would not mount */
	NO_KVM = 3,         /* every module is in, and there is no /dev/kvm */
	NO_COMMAND = 4,     /* the share does not say what to run, or it cannot be run */
};

/* Whether all that the guest needs came in the initramfs: then this is Bochs. */
static int alone;

static void out(unsigned char byte, unsigned short port)
{
	__asm__ volatile("outb %0, %1" : : "a"(byte), "Nd"(port));
}

static void send(const char *data, size_t size)
{
	for (size_t at = 0; at < size; at++)
		out((unsigned char)data[at], BOCHS_OUTPUT_PORT);
}

static void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("kvmtrace-lab: ", stdout);
	vprintf(format, arguments);
	putchar('\n');
	fflush(stdout);
	va_end(arguments);
}

static void power_off(enum ending how)
{
	sync();
	tcdrain(STDOUT_FILENO);
	int ports = iopl(3) == 0;
	if (ports && alone) {
		char code[32];
		send(code, (size_t)snprintf(code, sizeof(code), "\1END %d\n", how));
		for (const char *at = "Shutdown"; *at; at++)
			out((unsigned char)*at, BOCHS_SHUTDOWN_PORT);
	} else if (ports) {
		out((unsigned char)how, DEBUG_EXIT_PORT);
	}
	/* Not reached under either. PID 1 returning panics the guest, which the host tells from an orderly end. */
	_exit(1);
}

static void need_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
	mkdir(target, 0755);
	if (mount(source, target, type, flags, data) == 0)
		return;
	say("mount: %s on %s: %s", type, target, strerror(errno));
	power_off(MOUNT_REFUSED);
}

/* Every line of /modules is `FILE PARAMETERS`, dependencies first. */
static void load_modules(void)
{
	char line[4096];
	FILE *list = fopen("/modules", "r");

	while (list && fgets(line, sizeof(line), list)) {
		line[strcspn(line, "\n")] = 0;
		char *parameters = strchr(line, ' ');
		if (!parameters)
			continue;
		*parameters++ = 0;
		int fd = open(line, O_RDONLY | O_CLOEXEC);
		/* EEXIST: the kernel has it built in and the tree has it as a module too. */
		if (fd < 0 || (syscall(SYS_finit_module, fd, parameters, 0) && errno != EEXIST)) {
			say("module: %s: %s", line, strerror(errno));
			power_off(MODULE_REFUSED);
		}
		close(fd);
	}
	if (list)
		fclose(list);
}

static void copy(const char *from, const char *to)
{
	static char data[1 << 16];
	int in = open(from, O_RDONLY | O_CLOEXEC), made = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	for (ssize_t got; in >= 0 && made >= 0 && (got = read(in, data, sizeof(data))) > 0;)
		if (write(made, data, (size_t)got) != got)
			say("probes: %s: %s", to, strerror(errno));
	close(in);
	close(made);
}

static void copy_probes(const char *into)
{
	DIR *directory = opendir(PROBES);
	struct dirent *entry;

	while (directory && (entry = readdir(directory))) {
		char from[600], to[800];

		snprintf(from, sizeof(from), PROBES "/%s", entry->d_name);
		snprintf(to, sizeof(to), "%s/%s", into, entry->d_name);
		if (entry->d_name[0] != '.' && access(to, F_OK))
			copy(from, to);
	}
	if (directory)
		closedir(directory);
}

/* The probes that came in the initramfs go where the recorder looks for them, above the host's own files. */
static void keep_probes(const char *upper)
{
	char path[512];

	snprintf(path, sizeof(path), "%s" PROBES, upper);
	for (char *slash = path + strlen(upper) + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
		*slash = 0;
		mkdir(path, 0755);
	}
	mkdir(path, 0755);
	copy_probes(path);
}

static void enter_host_root(void)
{
	need_mount("proc", "/proc", "proc", 0, NULL);
	need_mount("host", "/host", "9p", MS_RDONLY, "trans=virtio,version=9p2000.L,msize=512000,cache=loose");
	need_mount("tmpfs", "/rw", "tmpfs", 0, NULL);
	mkdir("/rw/upper", 0755);
	mkdir("/rw/work", 0755);
	keep_probes("/rw/upper");
	need_mount("overlay", "/root", "overlay", 0, "lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work");
	if (chdir("/root") || chroot(".")) {
		say("mount: chroot: %s", strerror(errno));
		power_off(MOUNT_REFUSED);
	}
}

static void mount_kernel_file_systems(void)
{
	need_mount("proc", "/proc", "proc", 0, NULL);
	need_mount("sysfs", "/sys", "sysfs", 0, NULL);
	if (!alone)
		need_mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	/* A user's own kernel may lack one of these; what needs it then says so itself. */
	mkdir("/dev/shm", 01777);
	mkdir("/dev/pts", 0755);
	mount("tmpfs", "/dev/shm", "tmpfs", 0, NULL);
	mount("devpts", "/dev/pts", "devpts", 0, NULL);
	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
	mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, NULL);
	mount("bpf", "/sys/fs/bpf", "bpf", 0, NULL);
	mkdir("/tmp", 01777);
	if (alone)
		return;
	mkdir("/mnt", 0755);
	/* No cache: the host reads these files while the guest writes them. */
	need_mount("lab", SHARE, "9p", 0, "trans=virtio,version=9p2000.L,msize=512000,cache=none");
}

/* Every file below the share, names relative to it. */
static void send_share(const char *path, const char *prefix)
{
	static char data[1 << 16];
	DIR *directory = opendir(path);
	struct dirent *entry;

	while (directory && (entry = readdir(directory))) {
		char name[512], head[700];
		struct stat facts;

		snprintf(name, sizeof(name), "%s/%s", path, entry->d_name);
		if (entry->d_name[0] == '.' || stat(name, &facts))
			continue;
		if (S_ISDIR(facts.st_mode)) {
			snprintf(head, sizeof(head), "%s%s/", prefix, entry->d_name);
			send_share(name, head);
			continue;
		}
		int fd = open(name, O_RDONLY | O_CLOEXEC);
		send(head, (size_t)snprintf(head, sizeof(head), "\1FILE %s%s %lld\n", prefix, entry->d_name,
					    (long long)facts.st_size));
		long long left = facts.st_size;
		for (ssize_t got; left && (got = read(fd, data, left < (long long)sizeof(data) ? (size_t)left : sizeof(data))) > 0; left -= got)
			send(data, (size_t)got);
		close(fd);
	}
	if (directory)
		closedir(directory);
}

static char *read_share(const char *name, size_t *size)
{
	char path[64];
	struct stat facts;

	snprintf(path, sizeof(path), SHARE "/%s", name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &facts))
		goto missing;
	char *text = calloc(1, (size_t)facts.st_size + 1);
	ssize_t got = text ? read(fd, text, (size_t)facts.st_size) : -1;
	if (got != facts.st_size)
		goto missing;
	close(fd);
	*size = (size_t)got;
	return text;
missing:
	say("command: %s: %s", path, strerror(errno));
	power_off(NO_COMMAND);
	return NULL;
}

static char **split_at_nul(char *text, size_t size)
{
	size_t count = 0;
	for (size_t at = 0; at < size; at++)
		count += text[at] == 0;
	char **words = calloc(count + 1, sizeof(*words));
	for (size_t word = 0, at = 0; words && word < count; word++) {
		words[word] = text + at;
		at += strlen(text + at) + 1;
	}
	return words;
}

static void redirect(const char *path, int flags, int onto)
{
	int fd = open(path, flags, 0644);
	if (fd < 0 || dup2(fd, onto) < 0) {
		say("command: %s: %s", path, strerror(errno));
		_exit(127);
	}
	close(fd);
}

static pid_t start_command(void)
{
	size_t size;
	char *text = read_share("argv", &size);
	char **argv = split_at_nul(text, size);
	text = read_share("environ", &size);
	char **environment = split_at_nul(text, size);
	char *cwd = read_share("cwd", &size);

	pid_t child = fork();
	if (child != 0)
		return child;
	setsid();
	if (chdir(cwd))
		say("command: %s: %s (left at /)", cwd, strerror(errno));
	redirect("/dev/null", O_RDONLY, STDIN_FILENO);
	redirect(SHARE "/stdout", O_WRONLY | O_CREAT | O_APPEND, STDOUT_FILENO);
	redirect(SHARE "/stderr", O_WRONLY | O_CREAT | O_APPEND, STDERR_FILENO);
	environ = environment;
	execvp(argv[0], argv);
	dprintf(STDERR_FILENO, "%s: %s\n", argv[0], strerror(errno));
	_exit(127);
}

/* The kernel's own log: warnings of a kernel under test count even when the command ended well. */
static void save_kernel_log(void)
{
	int size = klogctl(10 /* SYSLOG_ACTION_SIZE_BUFFER */, NULL, 0);
	char *text = size > 0 ? malloc((size_t)size) : NULL;
	int got = text ? klogctl(3 /* SYSLOG_ACTION_READ_ALL */, text, size) : -1;
	int fd = open(SHARE "/dmesg", O_WRONLY | O_CREAT | O_TRUNC, 0644);

	if (fd >= 0 && got > 0 && write(fd, text, (size_t)got) != got)
		say("dmesg: %s", strerror(errno));
	if (fd >= 0)
		close(fd);
}

int main(void)
{
	struct timespec begin, end;
	int status = 0;
	pid_t child, ended;

	alone = access(SHARE "/argv", R_OK) == 0;
	need_mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	load_modules();
	if (access("/dev/kvm", R_OK | W_OK)) {
		say("kvm: /dev/kvm: %s", strerror(errno));
		power_off(NO_KVM);
	}
	if (!alone)
		enter_host_root();
	mount_kernel_file_systems();
	say("ready");

	clock_gettime(CLOCK_MONOTONIC, &begin);
	child = start_command();
	do
		ended = wait(&status);
	while (ended != child && (ended > 0 || errno == EINTR));
	clock_gettime(CLOCK_MONOTONIC, &end);

	save_kernel_log();
	copy_probes(SHARE); /* for the next guest */
	FILE *result = fopen(SHARE "/status", "w");
	if (!result || child < 0 || ended != child) {
		say("command: %s", strerror(errno));
		power_off(NO_COMMAND);
	}
	fprintf(result, "%s %d %.6f\n", WIFSIGNALED(status) ? "signal" : "exit",
		WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status),
		(double)(end.tv_sec - begin.tv_sec) + (double)(end.tv_nsec - begin.tv_nsec) / 1e9);
	if (fclose(result))
		say("command: %s/status: %s", SHARE, strerror(errno));
	if (alone && iopl(3) == 0)
		send_share(SHARE, "");
	say("done");
	power_off(ORDERLY);
}
