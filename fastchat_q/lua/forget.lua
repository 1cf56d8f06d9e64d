-- FORGET: a client deletes its job: it is ended if it has not, and what was asked and answered is gone at once. What is left
-- of the record for a moment says that it has ended: an API server that still reads it would take a job without a record
-- for one that was lost, and submit it again.
--
-- ARGV: 1 id, 2 tenant whose job it must be, or '', 3 prefix of the workers' hint channels
-- returns the state before, or 'none'
local REMAINS_MS = 120000
allow_at_maxmemory()
local id = ARGV[1]
local h = redis.call('HMGET', JOB .. id, 'state', 'worker', 'tenant', 'idem', 'dead_sid', 'view')
local state, worker, idem = h[1], h[2], h[4]
if not state or not h[6] or (ARGV[2] ~= '' and h[3] ~= ARGV[2]) then return 'none' end
if state == 'queued' or state == 'running' then
  terminal(id, 'cancelled', 'deleted', '')
  if worker ~= '' then redis.call('PUBLISH', ARGV[3] .. worker, 'cancel ' .. id) end
elseif state == 'dead' then
  redis.call('XDEL', DEAD, h[5])
  redis.call('HSET', JOB .. id, 'state', 'cancelled')   -- it must not be revived without what was asked
end
if idem and idem ~= '' then
  local mine = redis.call('GET', IDEM .. idem)
  if mine and string.match(mine, '^(%S+)') == id then redis.call('DEL', IDEM .. idem) end
end
redis.call('DEL', LOG .. id)
redis.call('HDEL', JOB .. id, 'view', 'spec', 'result')
redis.call('HSET', JOB .. id, 'reason', 'deleted')
redis.call('PEXPIRE', JOB .. id, REMAINS_MS)
return state
