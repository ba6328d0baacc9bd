#!/usr/bin/env python3
"""Static archives that stand in for NVIDIA's libraries when the worker is linked.

    stand_ins.py --cudarc DIR --candle-kernels DIR --out DIR

candle asks the linker for -lcuda, -lcublas and so on. Linked against the real libraries, a program does not start on a
machine without a driver. Against these archives it does: each function loads its library at the first call, and returns
the library's own code for "not initialised" where the library is not there. The names come from cudarc's bindings, the
declarations of what the program can call.

libcudart.a is different. Of the runtime API candle needs only what its kernels for quantised GGUF files call; the worker
does not read that format, and `toolchain.sh` leaves those kernels out. Their launchers end the process, by name.
"""

import argparse
import pathlib
import re
import subprocess

# Link name: module of cudarc, names that the loader is asked for, code of a function whose library is not there.
LIBRARIES = {
    "cuda": ("driver", ["libcuda.so.1"], 303),  # CUDA_ERROR_SHARED_OBJECT_INIT_FAILED
    "cublas": ("cublas", ["libcublas.so.13", "libcublas.so"], 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "cublasLt": ("cublaslt", ["libcublasLt.so.13", "libcublasLt.so"], 1),
    "curand": ("curand", ["libcurand.so.10", "libcurand.so"], 203),  # CURAND_STATUS_INITIALIZATION_FAILED
    "nvrtc": ("nvrtc", ["libnvrtc.so.13", "libnvrtc.so"], 11),  # NVRTC_ERROR_INTERNAL_ERROR
    "cudnn": ("cudnn", ["libcudnn.so.9", "libcudnn.so"], 1001),  # CUDNN_STATUS_NOT_INITIALIZED
    "nccl": ("nccl", ["libnccl.so.2", "libnccl.so"], 3),  # ncclInternalError
}

# A function jumps to its target: at first the code that looks it up, after that the library's function.
# Looking up saves every register that can carry an argument (System V calling convention of x86-64).
ASSEMBLY = """
.macro function index, name
    .globl \\name
    .type \\name, @function
\\name:
    jmp *{library}_targets+8*\\index(%rip)
    .size \\name, . - \\name
{library}_first_\\index:
    mov $\\index, %eax
    jmp {library}_look_up
.endm

.text
{library}_look_up:
    push %rbp
    mov %rsp, %rbp
    push %rdi
    push %rsi
    push %rdx
    push %rcx
    push %r8
    push %r9
    sub $128, %rsp
    movups %xmm0, (%rsp)
    movups %xmm1, 16(%rsp)
    movups %xmm2, 32(%rsp)
    movups %xmm3, 48(%rsp)
    movups %xmm4, 64(%rsp)
    movups %xmm5, 80(%rsp)
    movups %xmm6, 96(%rsp)
    movups %xmm7, 112(%rsp)
    mov %rax, %rdi
    call {library}_resolve
    mov %rax, %r11
    movups (%rsp), %xmm0
    movups 16(%rsp), %xmm1
    movups 32(%rsp), %xmm2
    movups 48(%rsp), %xmm3
    movups 64(%rsp), %xmm4
    movups 80(%rsp), %xmm5
    movups 96(%rsp), %xmm6
    movups 112(%rsp), %xmm7
    add $128, %rsp
    pop %r9
    pop %r8
    pop %rcx
    pop %rdx
    pop %rsi
    pop %rdi
    pop %rbp
    jmp *%r11

{functions}

.data
.balign 8
.globl {library}_targets
.hidden {library}_targets
{library}_targets:
{targets}
.section .note.GNU-stack, "", @progbits
"""

C = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>

static const char *const files[] = {{{files}}};
static const struct {{ const char *name; char is_text; }} functions[] = {{
{functions}
}};
extern __attribute__((visibility("hidden"))) void *{library}_targets[];
static pthread_once_t once = PTHREAD_ONCE_INIT;
static void *library;

static void load(void) {{
  for (size_t i = 0; !library && i < sizeof files / sizeof *files; i++)
    library = dlopen(files[i], RTLD_NOW | RTLD_GLOBAL);
}}

static long absent_code(void) {{ return {code}; }}
static const char *absent_text(void) {{ return "{file} is not there"; }}

__attribute__((visibility("hidden"))) void *{library}_resolve(size_t index) {{
  pthread_once(&once, load);
  void *target = library ? dlsym(library, functions[index].name) : NULL;
  if (!target)
    return functions[index].is_text ? (void *)absent_text : (void *)absent_code;
  __atomic_store_n(&{library}_targets[index], target, __ATOMIC_RELEASE);
  return target;
}}
"""

LAUNCHERS = """
#include <stdio.h>
#include <stdlib.h>
#define LAUNCHER(name) void name(void) {{ fputs(#name ": kernels for GGUF are not part of this build\\n", stderr); abort(); }}
{launchers}
"""


def functions_of(bindings):
    """Names that the bindings declare, with whether they return a text."""
    declared = r"^pub unsafe fn ((?:cu|nvrtc|p?nccl)\w+)\([^)]*\)(?: -> ([^{]+?))? \{"
    found = re.findall(declared, bindings.read_text(), re.MULTILINE)
    # `culib` is cudarc's own.
    functions = {name: "c_char" in returned for name, returned in found if name != "culib"}
    if not functions:
        raise SystemExit(f"{bindings} declares no functions: scripts/cuda/stand_ins.py does not know this version of cudarc")
    return dict(sorted(functions.items()))


def archive(out, name, objects):
    path = out / f"lib{name}.a"
    path.unlink(missing_ok=True)
    subprocess.run(["ar", "rcs", path, *objects], check=True)


def compiled(out, name, text):
    source = out / name
    source.write_text(text)
    target = source.with_suffix(source.suffix + ".o")
    subprocess.run(["gcc", "-O2", "-fPIC", "-w", "-c", source, "-o", target], check=True)
    return target


def stand_in(out, library, module, files, code, cudarc):
    functions = functions_of(cudarc / "src" / module / "sys" / "mod.rs")
    rows = [f'  {{"{name}", {int(is_text)}}},' for name, is_text in functions.items()]
    text = C.format(library=library, files=", ".join(f'"{file}"' for file in files), file=files[0], code=code, functions="\n".join(rows))
    macros = [f"    function {index}, {name}" for index, name in enumerate(functions)]
    targets = [f"    .quad {library}_first_{index}" for index in range(len(functions))]
    assembly = ASSEMBLY.format(library=library, functions="\n".join(macros), targets="\n".join(targets))
    archive(out, library, [compiled(out, f"{library}.c", text), compiled(out, f"{library}_jumps.s", assembly)])
    return len(functions)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cudarc", type=pathlib.Path, required=True, help="sources of the crate cudarc")
    parser.add_argument("--candle-kernels", type=pathlib.Path, required=True, help="sources of the crate candle-kernels")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the archives go")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    count = sum(stand_in(arguments.out, library, *rest, arguments.cudarc) for library, rest in LIBRARIES.items())
    declarations = (arguments.candle_kernels / "src" / "ffi.rs").read_text()
    launchers = sorted(set(re.findall(r"pub fn (\w+)\(", declarations)))
    text = LAUNCHERS.format(launchers="\n".join(f"LAUNCHER({name})" for name in launchers))
    archive(arguments.out, "cudart", [compiled(arguments.out, "launchers.c", text)])
    print(f"{count} functions of {len(LIBRARIES)} libraries, {len(launchers)} launchers")


if __name__ == "__main__":
    main()
