// How many steps a batch has to go, and what tokens are worth: it ends with its last sequence.
//
// Where nobody waits for its place, a sequence that ends early saves its own share of the steps to
// come only; how many there are, is up to the sequence that is the last. A sequence that has r
// tokens to go and gains g of them in a step beyond the plain one needs n = r / (1 + g) steps, more
// or less: texts differ in how much of their drafts is accepted, and so do the steps of one text.
// With `own` of a step's time what it takes for single sequences,
//
//     steps to go = own mean(n) + (1 - own) E[max n],    E[max n] = T ln(sum exp(n / T))
//
// which has the mean of the largest of B equal normal numbers within a tenth for B from 2 to 32 if
// T is kSoft of their deviation. The slope of E[max n] tells who is likely to be the last.
#pragma once

#include <vector>

namespace inferlab::planner {

constexpr double kTexts = 0.3;  // deviation of what texts gain, relative to the mean: measured 0.22
                                // to 0.5
constexpr double kSteps = 0.65;  // and of what the steps of a text gain

// How a batch goes on, for some ways to draft.
struct Course {
  std::vector<double> steps;              // to its end, of each way
  std::vector<std::vector<double>> pull;  // [B][ways] a token's worth, relative to one for all
};

// To the end of a batch: tokens of each sequence that are still to come; [B][ways] how many a step
// brings each beyond the plain one, 0 where it goes plainly; of each sequence, in [0, 1], how far
// that is known; own in [0, 1], 1 where each token counts alike.
Course course(const std::vector<int>& remaining, const std::vector<std::vector<double>>& gained,
              const std::vector<double>& known, double own);

// What a token is worth to the others where it is the n-th that a step brings a sequence, n from 0
// on, and the sequences gain `gained` on average: the further ahead, the less.
std::vector<double> lead(int levels, double gained);

}  // namespace inferlab::planner
