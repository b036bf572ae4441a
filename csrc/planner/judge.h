// Who hears of drafts while they are made, and says what they are worth: see `Judge` in
// specdec/control.py.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace inferlab::planner {

class Judge {
 public:
  virtual ~Judge() = default;
  virtual bool examined(const std::vector<int64_t>& requests,
                        const std::vector<std::vector<double>>& sure,
                        const std::vector<std::vector<bool>>& right) = 0;
  virtual bool goes_on(const std::vector<int64_t>& requests, const std::vector<int>& kinds) = 0;
  virtual std::vector<int> keep(const std::vector<int64_t>& requests,
                                const std::vector<std::vector<int>>& kinds) = 0;
  virtual void followed(const std::vector<int64_t>& requests,
                        const std::vector<std::vector<int>>& kinds,
                        const std::vector<std::vector<int>>& accepted) = 0;
};

// Notes what was drafted, and passes it on; without another judge all of it is kept.
class Listener : public Judge {
 public:
  explicit Listener(Judge* judge) : judge_(judge) {}

  bool examined(const std::vector<int64_t>& requests, const std::vector<std::vector<double>>& sure,
                const std::vector<std::vector<bool>>& right) override {
    return judge_ == nullptr || judge_->examined(requests, sure, right);
  }
  bool goes_on(const std::vector<int64_t>& requests, const std::vector<int>& kinds) override {
    return judge_ == nullptr || judge_->goes_on(requests, kinds);
  }
  std::vector<int> keep(const std::vector<int64_t>& requests,
                        const std::vector<std::vector<int>>& kinds) override {
    this->requests = requests;
    this->kinds = kinds;
    if (judge_ != nullptr) return judge_->keep(requests, kinds);
    std::vector<int> all;
    for (const auto& of_one : kinds) all.push_back(static_cast<int>(of_one.size()));
    return all;
  }
  void followed(const std::vector<int64_t>& requests, const std::vector<std::vector<int>>& kinds,
                const std::vector<std::vector<int>>& accepted) override {
    if (judge_ != nullptr) judge_->followed(requests, kinds, accepted);
  }

  std::vector<int64_t> requests;        // that were drafted for,
  std::vector<std::vector<int>> kinds;  // and the nodes of each

 private:
  Judge* judge_;
};

}  // namespace inferlab::planner
