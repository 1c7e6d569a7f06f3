import { exit, readInput, readStart, text, UsageError, type Command, type Invocation } from '../command.ts'
import {
  configuredProfiles,
  isId,
  isTenant,
  judgeRequestFile,
  requestFileMax,
  requestProfiles,
  type RequestQuestion,
  type RequestVerdict,
} from '../offline/request.ts'
import { facts } from '../output.ts'

const string = { type: 'string' } as const

const profilesOf = (call: Invocation, of: Pick<RequestQuestion, 'tenant' | 'hosts'>): RequestQuestion['profiles'] => {
  const path = text(call, 'config')
  let content: unknown = {}
  try {
    if (path !== undefined) content = JSON.parse(readInput(path).toString('utf8'))
  } catch (error) {
    throw error instanceof UsageError ? error : new UsageError(`--config ${path ?? ''}: ${error instanceof Error ? error.message : String(error)}`)
  }
  const profiles = configuredProfiles(content, of)
  if (typeof profiles === 'string') throw new UsageError(`--config ${path ?? ''}: ${profiles}`)
  return profiles
}

const questionOf = (call: Invocation): RequestQuestion => {
  const wanted = text(call, 'profile') ?? 'device-identity'
  const profile = requestProfiles.find((name) => name === wanted)
  if (profile === undefined) throw new UsageError(`--profile takes one of ${requestProfiles.join(', ')}, not ${wanted}`)
  const tenant = text(call, 'tenant') ?? 'default'
  if (!isTenant(tenant)) throw new UsageError(`--tenant: ${tenant} is none`)
  const id = text(call, 'id')
  if (id !== undefined && !isId(id)) throw new UsageError(`--id: ${id} is none`)
  const named = call.options['name']
  const hosts = [...new Set([...(Array.isArray(named) ? (named as readonly string[]) : []), 'localhost', '127.0.0.1', '::1'])]
  return {
    file: new Uint8Array(readStart(call.args[0] ?? '', requestFileMax)),
    profile,
    profiles: profilesOf(call, { tenant, hosts }),
    tenant,
    ...(id === undefined ? {} : { id }),
    hosts,
  }
}

const say = (verdict: RequestVerdict): string => {
  if (verdict.verdict === 'refused') return `REFUSED ${verdict.reason}: ${verdict.detail}${verdict.remedy === null ? '' : `\n${verdict.remedy}`}`
  const { subject, altNames, keyUsage, extKeyUsage, lifetime, key } = verdict.certificate
  return facts({
    verdict: 'accepted',
    profile: verdict.profile,
    subject,
    'alternative names': altNames.join(', '),
    'key usage': keyUsage.join(', '),
    purpose: extKeyUsage.join(', '),
    lifetime: `${lifetime / 3600} h`,
    key: `${key.kind} ${key.spkiSha256}`,
    ignored: verdict.ignored.join(', ') || null,
  })
}

export const caCommands: readonly Command[] = [
  {
    name: 'ca check-csr',
    usage: 'FILE [--profile NAME] [--id ID] [--tenant NAME] [--name HOSTNAME]… [--config FILE]',
    summary: 'judge a certification request offline (DER or PEM) and say what would be issued; exit 3 when it is refused',
    args: [1, 1],
    options: { profile: string, id: string, tenant: string, name: { type: 'string', multiple: true }, config: string },
    run(call) {
      const verdict = judgeRequestFile(questionOf(call))
      call.out.result(verdict, () => say(verdict))
      return Promise.resolve(verdict.verdict === 'accepted' ? exit.ok : exit.refused)
    },
  },
]
