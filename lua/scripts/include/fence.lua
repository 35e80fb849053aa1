-- Shared by every script that writes: the fence (F1, F2) and the ledger's time (F5).

-- Why the fence that was found is not the one the caller carries. Nothing has happened yet.
local function refusal(found, given)
  if not found then
    return {'NO_FENCE'}
  end
  local schema, ledger, epoch = string.match(found, '^(%d+):([^:]+):(%d+):[^:]+$')
  local own_schema, own_ledger, own_epoch = string.match(given, '^(%d+):([^:]+):(%d+):[^:]+$')
  if not own_schema then
    return redis.error_reply('ERR malformed fence in the call')
  end
  if schema ~= own_schema or ledger ~= own_ledger then
    return {'FOREIGN', found}
  end
  if tonumber(epoch) < tonumber(own_epoch) then
    return {'FUTURE_EPOCH', epoch}
  end
  return {'STALE_EPOCH', epoch}
end

-- A ledger that lacks what every write leaves behind. Found before the first write: nothing has happened.
local function damaged(what)
  return redis.error_reply('DAMAGED ' .. what)
end

-- Milliseconds since 1970, never less than the last time the ledger has stored: a sale does not re-open
-- because the clock of a new master is behind.
local function ledger_time(stored)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  return math.max(now, tonumber(stored) or 0)
end
