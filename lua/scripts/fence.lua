#!lua flags=allow-oom
-- Sets the fence: creates it (init), replaces it whatever it was (adopt), or lifts it to a later epoch.
-- The first entry of the new epoch in the outbox says so to every reader.
--
-- Every way out but {'OK'} leaves everything as it was.
--
-- It also runs without its first line, inside MULTI behind REPLICAOF NO ONE: Redis 7 refuses to queue a
-- script that declares itself a writer while the server is still a replica.
--
-- KEYS  1 fence  2 clock  3 seq  4 outbox
-- ARGV  1 init | adopt | lift  2 the new fence  3 its epoch  4 channel for news
--       5 lift: the fence that is expected now  6 'check' to decide only and write nothing
-- Reply {'OK', seq} | {'SAME', seq} it is there already
--       {'EXISTS', fence} init found a fence | {'NOT_EMPTY'} init found a ledger without a fence
--       {'MISMATCH', fence or ''} lift found another fence
--       {'EPOCH_TOO_LOW', epoch} the fence or the outbox is at that epoch already, so that ids could repeat
--@include fence

local state_of = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3])
local found = state_of[1]
local seq = tonumber(state_of[3]) or 0
if found == ARGV[2] then
  return {'SAME', seq}
end
if ARGV[1] == 'init' then
  if found then
    return {'EXISTS', found}
  end
  if redis.call('EXISTS', KEYS[1], KEYS[2], KEYS[3], KEYS[4]) > 0 then
    return {'NOT_EMPTY'}
  end
elseif ARGV[1] == 'lift' then
  if found ~= ARGV[5] then
    return {'MISMATCH', found or ''}
  end
elseif ARGV[1] ~= 'adopt' then
  return redis.error_reply('ERR unknown way to set a fence')
end

-- An outbox that lost its counter, or the other way round, continues behind the larger of the two.
local reached = found and tonumber(string.match(found, '^%d+:[^:]+:(%d+):[^:]+$')) or 0
local last = redis.call('XREVRANGE', KEYS[4], '+', '-', 'COUNT', 1)
if last[1] then
  local epoch, sequence = string.match(last[1][1], '^(%d+)%-(%d+)$')
  reached = math.max(reached, tonumber(epoch))
  seq = math.max(seq, tonumber(sequence))
end
if reached >= tonumber(ARGV[3]) then
  return {'EPOCH_TOO_LOW', reached}
end
if ARGV[6] == 'check' then
  return {'OK', seq}
end
local now = ledger_time(state_of[2])
seq = seq + 1
redis.call('XADD', KEYS[4], ARGV[3] .. '-' .. seq, 'v', '1', 'k', 'epoch', 's', '', 'a', now, 'o', ARGV[2])
redis.call('SET', KEYS[1], ARGV[2])
redis.call('MSET', KEYS[2], now, KEYS[3], seq)
redis.call('PUBLISH', ARGV[4], ARGV[3] .. '::')
return {'OK', seq}
