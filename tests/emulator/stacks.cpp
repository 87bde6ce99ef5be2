// Stacks of fibres, and the switch from one to another.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fibres.h"

// emu_switch(save, load): pushes the callee-saved registers, stores the stack pointer in *save, and
// goes on where the stack pointer `load` was stored.
extern "C" void emu_switch(void** save, void* load);
extern "C" void emu_enter();  // the first frame of a fibre

#if defined(__x86_64__)
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");
void* emu::first_frame(char* top) {
  void** sp =
      reinterpret_cast<void**>(top) - 1;  // on entry sp + 8 is 16-byte aligned, as the ABI wants
  *sp = nullptr;                          // emu_enter never returns
  *--sp = reinterpret_cast<void*>(&emu_enter);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch,%function
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emu_switch, .-emu_switch
)");
void* emu::first_frame(char* top) {
  void** sp = reinterpret_cast<void**>(top) - 20;
  std::memset(sp, 0, 160);
  sp[11] = reinterpret_cast<void*>(&emu_enter);  // x30
  return sp;
}
#else
#error "the emulator switches stacks by hand: write emu_switch for this processor"
#endif

namespace emu {
namespace {

void* scheduler_sp = nullptr;
#if EMU_ASAN
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
void* scheduler_fake = nullptr;
#endif

}  // namespace

void to_scheduler(bool for_good) {
#if EMU_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
#else
  (void)for_good;
#endif
  emu_switch(&self->sp, scheduler_sp);
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_size);
#endif
}

void to_fibre(Fibre& f) {
  self = &f;
  threadIdx = f.index;
  blockIdx = f.block->index;
#if EMU_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake, stacks[&f - fibres.data()] + kGuard, kStack);
#endif
  emu_switch(&scheduler_sp, f.sp);
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

void enter_fibre() {
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
}

char* stack_of(size_t i) {
  while (stacks.size() <= i) {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("emulator: mmap of a fibre's stack");
      std::abort();
    }
    mprotect(memory, kGuard, PROT_NONE);
    stacks.push_back(static_cast<char*>(memory));
  }
#if EMU_ASAN
  __asan_unpoison_memory_region(stacks[i] + kGuard, kStack);  // frames of an earlier fibre
#endif
  return stacks[i];
}

}  // namespace emu
