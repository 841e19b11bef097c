/* Python in a program of its own, so that /proc/PID/exe is `swtpm`, as libvirt asks, and so that it starts sooner.
 *
 * Built by script/launcher, which gives VTPM_PATHS: where Python looks for modules, as it was when the launcher was built.
 * The environment and the user's site packages do not count, and neither do .pth files. */
#include <Python.h>
#include <string.h>

static const char *const paths[] = {VTPM_PATHS};

static void require(PyStatus status) {
  if (PyStatus_Exception(status)) Py_ExitStatusException(status);
}

int main(int argc, char **argv) {
  const char *name = strrchr(argv[0], '/');
  name = name ? name + 1 : argv[0];
  const char *module = strstr(name, "setup") ? "vtpm.cli.dropin_setup" : "vtpm.cli.dropin";

  PyConfig config;
  PyConfig_InitIsolatedConfig(&config);
  config.site_import = 0;
  config.write_bytecode = 0;
  /* SIGPIPE is ignored, as everywhere in Python. */
  config.install_signal_handlers = 1;
  config.module_search_paths_set = 1;
  require(PyConfig_SetBytesArgv(&config, argc, argv));
  for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
    wchar_t *path = Py_DecodeLocale(paths[i], NULL);
    if (path == NULL) return 1;
    require(PyWideStringList_Append(&config.module_search_paths, path));
    PyMem_RawFree(path);
  }
  require(Py_InitializeFromConfig(&config));
  PyConfig_Clear(&config);

  PyObject *imported = PyImport_ImportModule(module);
  PyObject *result = imported ? PyObject_CallMethod(imported, "main", NULL) : NULL;
  /* `main` ends the process by itself. */
  if (result == NULL) PyErr_Print();
  return 1;
}
