#pragma once

#include <boost/json.hpp>
#include <string>

namespace nibble::app {

// JSON for people and programs: objects over several lines, arrays of plain values on one; the
// shortest digits that give a number back; null for NaN and infinities.
std::string to_text(const boost::json::value& value, int indent = 0);

}  // namespace nibble::app
