/* SPDX-License-Identifier: Apache-2.0 */
/* Options. */
#define _GNU_SOURCE
#include "vmm.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define USAGE \
	"usage: kvmtrace-vmm SCENARIO [--loops N] [--pages N] [--vcpus N] [--huge] [--timeout SECONDS]\n" \
	"                    [--trees N] [--mmio N] [--bit NAME] [--how NAME]\n" \
	"       kvmtrace-vmm --list     one JSON object a line: name, what it shows, defaults\n"

static unsigned timeout_seconds;

/* Only what a signal handler may call: a guest can keep KVM busy for minutes, and then nobody else gets a say. */
static void on_alarm(int signal)
{
	char line[80] = "kvmtrace-vmm: timeout: the scenario did not end within --timeout ";
	size_t n = strlen(line);
	unsigned scale = 1;

	(void)signal;
	while (timeout_seconds / scale >= 10)
		scale *= 10;
	for (; scale > 0; scale /= 10)
		line[n++] = (char)('0' + timeout_seconds / scale % 10);
	line[n++] = '\n';
	put_settings_back();
	if (write(STDERR_FILENO, line, n) < 0)
		_exit(EXIT_GUEST_FAILED);
	_exit(EXIT_GUEST_FAILED);
}

static void on_end(int number)
{
	put_settings_back();
	signal(number, SIG_DFL);
	raise(number);
}

static unsigned number(const char *option, const char *text, unsigned max)
{
	char *end;
	unsigned long value;

	errno = 0;
	value = strtoul(text, &end, 10);
	if (errno != 0 || *end != '\0' || text[0] < '0' || text[0] > '9' || value < 1 || value > max)
		fail(EXIT_BAD_USAGE, "--%s %s: give a whole number from 1 to %u", option, text, max);
	return (unsigned)value;
}

static const char *choice(const struct scenario *scenario, const char *option, const char *text)
{
	char *all = strdup(scenario->choices);

	for (char *rest = all, *one; rest != NULL && (one = strsep(&rest, "|")) != NULL;)
		if (strcmp(one, text) == 0)
			return one; /* `all` lives as long as the program */
	fail(EXIT_BAD_USAGE, "--%s %s: give one of %s", option, text, scenario->choices);
}

static void not_taken(const struct scenario *scenario, const char *option, bool taken)
{
	if (!taken)
		fail(EXIT_BAD_USAGE, "scenario %s takes no --%s", scenario->name, option);
}

static const struct option long_options[] = {
	{"loops", required_argument, NULL, 'l'}, {"pages", required_argument, NULL, 'p'},
	{"vcpus", required_argument, NULL, 'v'}, {"trees", required_argument, NULL, 'r'},
	{"mmio", required_argument, NULL, 'm'},  {"bit", required_argument, NULL, 'b'},
	{"how", required_argument, NULL, 'w'},   {"timeout", required_argument, NULL, 't'},
	{"huge", no_argument, NULL, 'h'},        {NULL, 0, NULL, 0},
};

static struct options parse(const struct scenario *scenario, int argc, char **argv)
{
	struct options options = scenario->defaults;
	int which;

	opterr = 0;
	while ((which = getopt_long(argc, argv, "+:", long_options, NULL)) != -1) {
		switch (which) {
		case 'l':
			options.loops = number("loops", optarg, 1000000000);
			break;
		case 'p':
			options.pages = number("pages", optarg, (GUEST_TOP - DATA_GPA) / PAGE);
			break;
		case 'v':
			options.vcpus = number("vcpus", optarg, MAX_VCPUS);
			break;
		case 'r':
			not_taken(scenario, "trees", scenario->defaults.trees > 0);
			options.trees = number("trees", optarg, MAX_TREES);
			break;
		case 'm':
			not_taken(scenario, "mmio", scenario->defaults.mmio > 0);
			options.mmio = number("mmio", optarg, (DOORBELL_GPA - HOLE_GPA) / PAGE);
			break;
		case 'b':
			not_taken(scenario, "bit", scenario->defaults.bit != NULL);
			options.bit = choice(scenario, "bit", optarg);
			break;
		case 'w':
			not_taken(scenario, "how", scenario->defaults.how != NULL);
			options.how = choice(scenario, "how", optarg);
			break;
		case 't':
			options.timeout = number("timeout", optarg, 86400);
			break;
		case 'h':
			options.huge = true;
			break;
		case ':':
			fail(EXIT_BAD_USAGE, "%s needs a value", argv[optind - 1]);
		default:
			fail(EXIT_BAD_USAGE, "unknown option %s; see kvmtrace-vmm --help", argv[optind - 1]);
		}
	}
	if (optind < argc)
		fail(EXIT_BAD_USAGE, "unexpected argument '%s'; see kvmtrace-vmm --help", argv[optind]);
	return options;
}

static void check(const struct run *run)
{
	const struct options *options = run->options;
	size_t sets = run->scenario->same_pages ? 1 : options->vcpus;
	size_t room = (GUEST_TOP - DATA_GPA) / sets;

	if (options->vcpus < run->scenario->min_vcpus)
		fail(EXIT_BAD_USAGE, "scenario %s needs --vcpus %u or more", run->scenario->name, run->scenario->min_vcpus);
	if (working_set_bytes(run) > room)
		fail(EXIT_BAD_USAGE, "scenario %s: the working sets exceed the guest's %u MiB: give fewer --pages%s",
		     run->scenario->name, (GUEST_TOP - DATA_GPA) >> 20,
		     run->scenario->growing ? " or --loops" : options->vcpus > 1 ? " or --vcpus" : "");
}

int main(int argc, char **argv)
{
	struct run run = {0};
	struct options options;

	if (argc < 2)
		fail(EXIT_BAD_USAGE, "name a scenario; kvmtrace-vmm --list shows them");
	if (strcmp(argv[1], "--help") == 0) {
		fputs(USAGE, stdout);
		return 0;
	}
	if (strcmp(argv[1], "--list") == 0) {
		print_list();
		return 0;
	}
	run.scenario = find_scenario(argv[1]);
	if (run.scenario == NULL)
		fail(EXIT_BAD_USAGE, "no scenario '%s'; kvmtrace-vmm --list shows them", argv[1]);
	options = parse(run.scenario, argc - 1, argv + 1);
	run.options = &options;
	check(&run);
	timeout_seconds = options.timeout;
	signal(SIGALRM, on_alarm);
	signal(SIGINT, on_end);
	signal(SIGTERM, on_end);
	alarm(timeout_seconds);
	run_scenario(&run);
	alarm(0);
	print_result(&run);
	return fflush(stdout) == 0 ? 0 : EXIT_GUEST_FAILED;
}
