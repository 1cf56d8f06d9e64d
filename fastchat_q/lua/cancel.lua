-- CANCEL: immediate for the client; the worker learns it from the hint, or else from its next EMIT.
--
-- ARGV: 1 id, 2 reason, 3 prefix of the workers' hint channels
-- returns the state before, or 'none'
allow_at_maxmemory()
local id = ARGV[1]
local h = redis.call('HMGET', JOB .. id, 'state', 'worker')
local state, worker = h[1], h[2]
if state == 'queued' or state == 'running' then
  terminal(id, 'cancelled', ARGV[2], '')
  if worker ~= '' then redis.call('PUBLISH', ARGV[3] .. worker, 'cancel ' .. id) end
end
return state or 'none'
