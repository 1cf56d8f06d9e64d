"""A llama.cpp server as a process: ``llama-server`` from the PATH, else the one inside of the package ``xllamacpp``.

It says where it listens in one line on stdout, and ends when its stdin does: so it never outlives the worker that
started it, whatever ends that.

Usage: MODEL SLOTS CONTEXT THREADS [cpu], with the key that it asks for in LLAMA_API_KEY. With ``cpu`` nothing goes to a
GPU; without, llama.cpp takes those that it was built for.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading

SERVER = "llama-server"
ERRORS_ONLY = 1


def main() -> None:
    """Runs the server until stdin is closed."""
    model, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:5])
    on_cpu = sys.argv[5:] == ["cpu"]
    if binary := shutil.which(SERVER):
        run_binary(binary, model, slots, context, threads, on_cpu)
    else:
        run_library(model, slots, context, threads, on_cpu)


def run_library(model: str, slots: int, context: int, threads: int, on_cpu: bool) -> None:
    """Within this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel, params.n_ctx = slots, slots * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if on_cpu:
        params.n_gpu_layers = 0
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    params.ui = False
    params.verbosity = ERRORS_ONLY
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # its threads would finish what they generate


def run_binary(binary: str, model: str, slots: int, context: int, threads: int, on_cpu: bool) -> None:
    """As a child of this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary, "--model", model, "--host", "127.0.0.1", "--port", str(port), "--parallel", str(slots)]
    command += ["--ctx-size", str(slots * context), "--threads", str(threads), "--no-webui", "--jinja"]
    command += ["--device", "none", "--n-gpu-layers", "0"] if on_cpu else []
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    print(f"http://127.0.0.1:{port}", flush=True)
    threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
    sys.exit(server.wait())


def _end_with_stdin(server: "subprocess.Popen[bytes]") -> None:
    sys.stdin.read()
    server.terminate()


if __name__ == "__main__":
    main()
