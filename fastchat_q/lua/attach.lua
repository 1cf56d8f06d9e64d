-- ATTACH: one more API process gets a job's events from now on; what was before is in the log.
--
-- ARGV: 1 id, 2 inbox, 3 tenant whose job it must be, or '', 4 tokens that its reader says it has, 5 '1' if it counts
--       events instead: how many there are depends on how the tokens are spread over the log's entries
-- returns {the job's view, 0}; {view, 1}: not attached, the job has others now than those; nil: there is no such job
local MAX_INBOXES = 16   -- the oldest give way: they are the ones whose process is gone
allow_at_maxmemory()
local h = redis.call('HMGET', JOB .. ARGV[1], 'state', 'inbox', 'tenant', 'view', 'void', 'recut')
if not h[1] or not h[4] or (ARGV[3] ~= '' and h[3] ~= ARGV[3]) then return false end   -- without a view: deleted
if tonumber(ARGV[4]) > 0 and (h[5] or (h[6] and ARGV[5] == '1')) then return {h[4], 1} end
if h[1] ~= 'queued' and h[1] ~= 'running' then return {h[4], 0} end
local words, detached = {}, false
for word in string.gmatch(h[2], '%S+') do
  if word == '*' then detached = true
  elseif word ~= ARGV[2] then words[#words + 1] = word end
end
words[#words + 1] = ARGV[2]
while #words > MAX_INBOXES do table.remove(words, 1) end
if detached then table.insert(words, 1, '*') end
redis.call('HSET', JOB .. ARGV[1], 'inbox', table.concat(words, ' '))
return {h[4], 0}
