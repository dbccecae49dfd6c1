// Captures of calls, for CUDA graphs.
#include <algorithm>
#include <cmath>

#include "host.h"

namespace emulated {
namespace {

Graph* graph = nullptr;
int not_recorded = 0;
std::vector<at::Tensor> generators;

void undo(const Graph::Call& call) {
  for (const auto& [tensor, before] : call.written) on_host(tensor).copy_(before);
  for (const auto& tensor : call.made)  // a device would leave there what was there
    if (tensor.is_floating_point() && !tensor.is_sparse() && tensor.is_non_overlapping_and_dense())
      on_host(tensor).fill_(NAN);
}

}  // namespace

void Graph::replay() const {
  NotRecorded guard;
  for (const auto& call : calls) call.again();
}

void begin_capture() {
  TORCH_CHECK(!graph, "a capture is under way");
  generators.clear();
  for (int k = 0; k < kDevices; ++k) generators.push_back(inside(generator(k)).get_state());
  graph = new Graph;
}

Graph end_capture() {
  TORCH_CHECK(graph, "no capture is under way");
  std::for_each(graph->calls.rbegin(), graph->calls.rend(), undo);
  for (int k = 0; k < kDevices; ++k) inside(generator(k)).set_state(generators[k]);
  Graph done = std::move(*graph);
  delete graph;
  graph = nullptr;
  return done;
}

bool capturing() { return graph && not_recorded == 0; }

NotRecorded::NotRecorded() { ++not_recorded; }
NotRecorded::~NotRecorded() { --not_recorded; }

Values values_of(const std::vector<at::Tensor>& tensors) {
  Values held;
  for (const auto& tensor : tensors) held.emplace_back(tensor, on_host(tensor).clone());
  return held;
}

void record(Graph::Call call) { graph->calls.push_back(std::move(call)); }

}  // namespace emulated
