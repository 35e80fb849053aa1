#!lua flags=allow-oom
-- Drops outbox entries that every center has stored (M2). Which those are is the caller's business.
--
-- KEYS  1 fence  2 clock  3 outbox
-- ARGV  1 fence of the caller  2 id of the first entry to keep
-- Reply {'OK', entries dropped}
--       {'NO_FENCE'} | {'FOREIGN', fence} | {'STALE_EPOCH', epoch} | {'FUTURE_EPOCH', epoch}
--@include fence

local found = redis.call('GET', KEYS[1])
if found ~= ARGV[1] then
  return refusal(found, ARGV[1])
end
return {'OK', redis.call('XTRIM', KEYS[3], 'MINID', '~', ARGV[2])}
