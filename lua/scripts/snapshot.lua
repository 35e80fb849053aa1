#!lua flags=no-writes,allow-stale
-- Reads the sales that changed after a sequence, oldest change first.
--
-- KEYS  1 fence  2 clock  3 seq  4 touched
-- ARGV  1 the sequence that the caller has seen  2 how many sales at most  3 prefix of the sales' keys
-- Reply {fence or false, clock, seq, time now (ms), {{sale id, sequence of its last change, field, value, …}, …}}

local state_of = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3])
local time = redis.call('TIME')
local changed = redis.call('ZRANGEBYSCORE', KEYS[4], '(' .. ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
local sales = {}
for i = 1, #changed, 2 do
  local sale = redis.pcall('HGETALL', ARGV[3] .. changed[i])
  if sale.err then
    sale = {} -- a key of the wrong type must not hide the other sales
  end
  table.insert(sale, 1, changed[i + 1])
  table.insert(sale, 1, changed[i])
  sales[#sales + 1] = sale
end
return {state_of[1], tonumber(state_of[2]) or 0, tonumber(state_of[3]) or 0,
  time[1] * 1000 + math.floor(time[2] / 1000), sales}
