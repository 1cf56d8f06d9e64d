-- What every script starts with (put in front of it by scripts.py). All names come in as KEYS; only ids are appended.
-- Time is redis.call('TIME') alone: one clock for all hosts. `fence` = '<attempt>-<nonce of the claiming call>' is
-- compared for equality, so that a counter rolled back by a failover cannot name two writers; '' = nobody may write.
--
-- KEYS: 1 job prefix, 2 token log prefix, 3 lease
local JOB, LOG, LEASE = KEYS[1], KEYS[2], KEYS[3]
local SAFETY_MS = 3600000   -- records and logs are kept so long beyond their job's deadline: nothing lives for ever

local function now()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- A script's DENYOOM check ends with its first write: with this one first, what drains the queue works at maxmemory.
local function allow_at_maxmemory()
  redis.call('ZREM', LEASE, '')
end

-- Sends a message to all channels of a job's `inbox`; returns how many listened. The word * in it is no channel: it
-- marks a job that goes on with nobody listening.
local function publish(inbox, message)
  local heard = 0
  for channel in string.gmatch(inbox, '[^%s*]+') do
    heard = heard + redis.call('PUBLISH', channel, message)
  end
  return heard
end
