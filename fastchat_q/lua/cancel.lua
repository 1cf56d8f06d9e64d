-- CANCEL: immediate for the client; the worker learns it from the hint, or else from its next EMIT.
--
-- ARGV: 1 id, 2 reason, 3 prefix of the workers' hint channels, 4 '' or the inbox that leaves: then the job is cancelled
--       only if no other inbox is left and it is not to go on with nobody listening (which counts unless 7 is '1'),
--       5 '' or the fence of a claim that finds its job abandoned: then it is cancelled only if nobody listens at this
--       moment, 6 tenant whose job it must be, or ''
-- returns the state before, or 'none'; for a fence also 'lost' (somebody else's by now) | 'heard'
allow_at_maxmemory()
local id, leaving = ARGV[1], ARGV[4]
local h = redis.call('HMGET', JOB .. id, 'state', 'worker', 'inbox', 'fence', 'tenant')
local state, worker = h[1], h[2]
if ARGV[6] ~= '' and h[5] ~= ARGV[6] then return 'none' end
if state ~= 'queued' and state ~= 'running' then return state or 'none' end
if ARGV[5] ~= '' then
  if h[4] ~= ARGV[5] then return 'lost' end
  if string.find(h[3], '*', 1, true) or publish(h[3], '') > 0 then return 'heard' end
end
if leaving ~= '' then
  local left, wanted = {}, false
  for word in string.gmatch(h[3], '%S+') do
    if word ~= leaving then
      left[#left + 1] = word
      wanted = wanted or word ~= '*' or ARGV[7] ~= '1'
    end
  end
  if wanted then
    redis.call('HSET', JOB .. id, 'inbox', table.concat(left, ' '))
    return state
  end
end
terminal(id, 'cancelled', ARGV[2], '')
if worker ~= '' then redis.call('PUBLISH', ARGV[3] .. worker, 'cancel ' .. id) end
return state
