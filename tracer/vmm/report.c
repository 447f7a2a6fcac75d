/* SPDX-License-Identifier: Apache-2.0 */
/* Everything the program prints: the list of scenarios, the result, the one line of a failure. */
#include "vmm.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

void fail(enum exit_code code, const char *format, ...)
{
	char line[512];
	va_list arguments;
	int n;

	va_start(arguments, format);
	n = vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	if (n > 0)
		dprintf(STDERR_FILENO, "kvmtrace-vmm: %s\n", line);
	put_settings_back();
	_exit(code); /* other threads may be inside KVM: end the process as it is */
}

static void print_options(const struct options *options)
{
	printf("\"loops\": %u, \"pages\": %u, \"vcpus\": %u, \"huge\": %s, \"timeout\": %u", options->loops,
	       options->pages, options->vcpus, options->huge ? "true" : "false", options->timeout);
	if (options->trees > 0)
		printf(", \"trees\": %u", options->trees);
	if (options->mmio > 0)
		printf(", \"mmio\": %u", options->mmio);
	if (options->bit != NULL)
		printf(", \"bit\": \"%s\"", options->bit);
	if (options->how != NULL)
		printf(", \"how\": \"%s\"", options->how);
}

void print_list(void)
{
	for (size_t i = 0; i < n_scenarios; i++) {
		const struct scenario *scenario = &scenarios[i];

		printf("{\"schema\": 1, \"name\": \"%s\", \"shows\": \"%s\", \"needs_smm\": %s, \"defaults\": {",
		       scenario->name, scenario->shows, scenario->smm == SMM_REQUIRED ? "true" : "false");
		print_options(&scenario->defaults);
		printf("}}\n");
	}
}

void print_result(const struct run *run)
{
	const struct tally *tally = &run->tally;

	printf("{\"schema\": 1, \"scenario\": \"%s\", ", run->scenario->name);
	print_options(run->options);
	printf(", \"vms\": %llu, \"setup_ns\": %llu, \"wall_ns\": %llu, \"guest_ns\": [", (unsigned long long)tally->vms,
	       (unsigned long long)tally->setup_ns, (unsigned long long)tally->wall_ns);
	for (unsigned i = 0; i < tally->n_guest_ns; i++)
		printf("%s%llu", i > 0 ? ", " : "", (unsigned long long)tally->guest_ns[i]);
	printf("], \"passes\": %llu, \"smis\": %llu, \"io_exits\": %llu, \"mmio_exits\": %llu, "
	       "\"halts\": %llu, \"shutdowns\": %llu, \"internal_errors\": %llu, \"failed_runs\": %llu, "
	       "\"slot_changes\": %llu, \"host_calls\": %llu, \"dirty_pages\": %llu}\n",
	       (unsigned long long)tally->passes, (unsigned long long)tally->smis, (unsigned long long)tally->io_exits,
	       (unsigned long long)tally->mmio_exits, (unsigned long long)tally->halts,
	       (unsigned long long)tally->shutdowns, (unsigned long long)tally->internal_errors,
	       (unsigned long long)tally->failed_runs, (unsigned long long)tally->slot_changes,
	       (unsigned long long)tally->host_calls, (unsigned long long)tally->dirty_pages);
}
