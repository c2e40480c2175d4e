/* Imports the package in the postmaster of a test run, so that each of its sessions begins with the imports: see __init__.py. */

#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"

#include <dlfcn.h>
#include <pthread.h>

PG_MODULE_MAGIC;

void		_PG_init(void);

static void (*after_fork_in_child) (void);

/* A process of the postmaster's tells Python once that it was forked: other locks, other random numbers. */
static void
in_child(void)
{
	void		(*once) (void) = after_fork_in_child;

	after_fork_in_child = NULL;
	if (once)
		once();
}

void
_PG_init(void)
{
	void		(*initialise) (int);
	int			(*run) (const char *);
	const char *script = getenv("EMBEDLINE_WARM");

	if (!process_shared_preload_libraries_in_progress || script == NULL)
		return;
	/* It brings the Python that it is linked with. */
	load_file("$libdir/plpython3", false);
	initialise = (void (*) (int)) dlsym(RTLD_DEFAULT, "Py_InitializeEx");
	run = (int (*) (const char *)) dlsym(RTLD_DEFAULT, "PyRun_SimpleString");
	after_fork_in_child = (void (*) (void)) dlsym(RTLD_DEFAULT, "PyOS_AfterFork_Child");
	if (!initialise || !run || !after_fork_in_child)
		elog(FATAL, "no Python to warm");
	initialise(0);
	if (run(script) != 0)
		elog(FATAL, "cannot warm Python");
	pthread_atfork(NULL, NULL, in_child);
}
