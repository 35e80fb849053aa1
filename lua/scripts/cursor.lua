#!lua flags=allow-oom
-- Notes up to where one destination of the relay has acknowledged everything that is for it. A cursor never goes
-- back: a relay that was asleep finds its place taken and changes nothing.
--
-- KEYS  1 fence  2 seq  3 cursors
-- ARGV  1 fence of the caller  2 epoch of the caller  3 destination
--       4 epoch and 5 sequence up to where it is acknowledged
--       6 the shards that this is true for: 16 hex digits, a bit for each
-- Reply {'OK'}
--       {'BEHIND', cursor}   a later one is noted
--       {'AHEAD', newest}    the ledger has no such entry yet
--       {'NO_FENCE'} | {'FOREIGN', fence} | {'STALE_EPOCH', epoch} | {'FUTURE_EPOCH', epoch}
-- A cursor is "EPOCH-SEQUENCE SHARDS".
--@include fence

local state_of = redis.call('MGET', KEYS[1], KEYS[2])
if state_of[1] ~= ARGV[1] then
  return refusal(state_of[1], ARGV[1])
end
local newest = tonumber(state_of[2])
if not newest then
  return damaged('the ledger has a fence but no sequence')
end
local epoch, sequence = tonumber(ARGV[4]), tonumber(ARGV[5])
if epoch > tonumber(ARGV[2]) or (ARGV[4] == ARGV[2] and sequence > newest) then
  return {'AHEAD', state_of[2]}
end
local noted = redis.call('HGET', KEYS[3], ARGV[3])
if noted then
  local noted_epoch, noted_sequence = string.match(noted, '^(%d+)-(%d+) %x+$')
  noted_epoch, noted_sequence = tonumber(noted_epoch), tonumber(noted_sequence)
  if not noted_epoch then
    return damaged('the cursor of ' .. ARGV[3] .. ' is none')
  end
  if epoch < noted_epoch or (epoch == noted_epoch and sequence < noted_sequence) then
    return {'BEHIND', noted}
  end
end
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4] .. '-' .. ARGV[5] .. ' ' .. ARGV[6])
return {'OK'}
