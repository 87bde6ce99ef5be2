// An op's arguments, listed once: the schema, what is read from torch's stack and the members that
// the op's function sees all come from one list.
//
//   #define EMBATTLE_SCALE(A) A(Tensor, x) A(double, by, 2.) A(OptionalTensor, mask, None)
//   EMBATTLE_ARGUMENTS(Scale, "scale", EMBATTLE_SCALE);   a struct with members x, by and mask
//   Tensor scale(const Scale& a);
//   ops.op<scale>("scale");      scale(Tensor x, float by=2., Tensor? mask=None) -> Tensor
//   ops.in_place<scale>("scale_");   scale_(Tensor(a!) x, float by=2., Tensor? mask=None) -> ()
//
// A default is written as in a schema. No argument is keyword-only: torch takes no autograd and
// vmap rules for keyword-only tensors.
#pragma once

#include "../stable.h"

namespace embattle {

constexpr std::nullopt_t None = std::nullopt;
constexpr bool False = false;
using OptionalNumber = std::optional<double>;
using OptionalInteger = std::optional<int64_t>;

// A tensor that an op counts in, also where it has no in-place form.
struct OptionalCounter : OptionalTensor {
  OptionalCounter(std::nullopt_t) {}
  OptionalCounter(OptionalTensor&& t) : OptionalTensor(std::move(t)) {}
};

// How a type is called in a schema.
template <class T>
constexpr const char* kSchemaType = nullptr;
template <>
inline constexpr const char* kSchemaType<Tensor> = "Tensor";
template <>
inline constexpr const char* kSchemaType<OptionalTensor> = "Tensor?";
template <>
inline constexpr const char* kSchemaType<OptionalCounter> = "Tensor(n!)?";
template <>
inline constexpr const char* kSchemaType<std::vector<Tensor>> = "Tensor[]";
template <>
inline constexpr const char* kSchemaType<double> = "float";
template <>
inline constexpr const char* kSchemaType<OptionalNumber> = "float?";
template <>
inline constexpr const char* kSchemaType<std::vector<double>> = "float[]";
template <>
inline constexpr const char* kSchemaType<int64_t> = "int";
template <>
inline constexpr const char* kSchemaType<OptionalInteger> = "int?";
template <>
inline constexpr const char* kSchemaType<bool> = "bool";
template <>
inline constexpr const char* kSchemaType<std::string> = "str";

// What the members of an op's arguments are read from.
class Arguments {
 public:
  Arguments(const char* op_, bool in_place_, StableIValue* stack, uint64_t count)
      : op(op_), in_place(in_place_), next_(stack), left_(count) {}

  const char* op;  // as messages call it
  bool in_place;   // the first tensors are written

 protected:
  template <class T>
  T take() {
    --left_;
    return torch::stable::detail::to<T>(*next_++);
  }
  // The op may have a form that ends before this argument.
  template <class T, class Default>
  T take(const Default& other) {
    if (left_ == 0) return T(other);
    if constexpr (std::is_same_v<T, OptionalCounter>)
      return take<OptionalTensor>();
    else
      return take<T>();
  }

 private:
  StableIValue* next_;
  uint64_t left_;
};

#define EMBATTLE_MEMBER(Type, name, ...) Type name = this->take<Type>(__VA_ARGS__);
#define EMBATTLE_VISIT(Type, name, ...) visit(kSchemaType<Type>, #name, #__VA_ARGS__);
#define EMBATTLE_ARGUMENTS(Struct, op_name, LIST) \
  struct Struct : Arguments {                     \
    using Arguments::Arguments;                   \
    static constexpr char kName[] = op_name;      \
    LIST(EMBATTLE_MEMBER)                         \
    template <class V>                            \
    static void each(V&& visit) {                 \
      LIST(EMBATTLE_VISIT)                        \
    }                                             \
  }

// How many of the first arguments an in-place form writes.
template <class Args>
constexpr int kWritten = 1;

template <class Args>
std::string schema(const std::string& name, const std::string& result, bool in_place, int count) {
  std::string text;
  int index = 0;
  Args::each([&](const char* type, const char* argument, const std::string& other) {
    if (index == count) return;
    if (index) text += ", ";
    text += type;
    if (in_place && index < kWritten<Args>) text += std::string("(") + char('a' + index) + "!)";
    text += std::string(" ") + argument + (other.empty() ? "" : "=") + other;
    ++index;
  });
  return name + "(" + text + ") -> " + (in_place ? "()" : result);
}

// The results of an op on the stack, and in a schema.
template <class T>
struct Result {
  static std::string schema() { return kSchemaType<T>; }
  static void give(StableIValue* stack, T&& result) {
    stack[0] = torch::stable::detail::from(std::move(result));
  }
};
template <class A, class B>
struct Result<std::tuple<A, B>> {
  static std::string schema() {
    return std::string("(") + kSchemaType<A> + ", " + kSchemaType<B> + ")";
  }
  static void give(StableIValue* stack, std::tuple<A, B>&& result) {
    torch::stable::detail::box_from_tuple<A, B>(stack, std::move(result));
  }
};

template <class F>
struct Signature;
template <class R, class A>
struct Signature<R (*)(const A&)> {
  using Args = A;
  using Return = R;
};

// Registers ops: their schemas in a namespace, or their functions for a dispatch key.
enum class Register { schemas, functions };

template <Register kWhat>
class Ops {
 public:
  explicit Ops(torch::stable::detail::StableLibrary& library) : library_(library) {}

  // `count`: the form with the first so many arguments; the others have their defaults.
  template <auto kFunction>
  void op(const char* name, int count = -1) {
    add<kFunction, false>(name, count);
  }
  template <auto kFunction>
  void in_place(const char* name, int count = -1) {
    add<kFunction, true>(name, count);
  }

 private:
  template <auto kFunction, bool kInPlace>
  void add(const char* name, int count) {
    using Of = Signature<decltype(kFunction)>;
    if constexpr (kWhat == Register::schemas)
      library_.def(
          schema<typename Of::Args>(name, Result<typename Of::Return>::schema(), kInPlace, count)
              .c_str());
    else
      library_.impl(name, &boxed<kFunction, kInPlace>);
  }

  template <auto kFunction, bool kInPlace>
  static void boxed(StableIValue* stack, uint64_t count, uint64_t) {
    using Of = Signature<decltype(kFunction)>;
    static const std::string name = std::string(Of::Args::kName) + (kInPlace ? "_" : "");
    const typename Of::Args args(name.c_str(), kInPlace, stack, count);
    auto result = kFunction(args);
    if constexpr (!kInPlace) Result<typename Of::Return>::give(stack, std::move(result));
  }

  torch::stable::detail::StableLibrary& library_;
};

}  // namespace embattle
